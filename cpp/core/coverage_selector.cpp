#include "core/coverage_selector.h"

#include <algorithm>
#include <cmath>

namespace elastic {

namespace {

// One run in one head. What a place is worth to a cell only shrinks as others get theirs, so a worth that was worked
// out earlier is a bound: only the cell at the top of the heap has to be brought up to date. All others are, once there
// are N_ANCHORS new anchors: many cells with a few anchors at a time stay in the cache.
class chooser {
  public:
    chooser(const run & r, const kv_points & points, const float * score)
        : r(r), points(points), score(score), n((int32_t) r.cells.size()), has_place(n, 0), known(n) {}

    // kept cells, indices in the run, ascending
    std::vector<int32_t> choose() {
        for (int32_t i = 0; i < n; ++i) {
            if (r.stay[i]) {
                take(i);
            }
        }
        if (anchors.empty() && n_taken < r.n_keep) {
            take(highest_score());
        }
        while (n_taken < r.n_keep) {
            std::vector<std::pair<double, int32_t>> heap;  // (worth, -place): ties to the earlier cell
            for (int32_t i = 0; i < n; ++i) {
                if (!has_place[i]) {
                    heap.emplace_back(worth(i), -i);
                }
            }
            std::make_heap(heap.begin(), heap.end());
            while (n_taken < r.n_keep && (int32_t) anchors.size() - n_passed < N_ANCHORS) {
                const int32_t i = -heap.front().second;
                std::pop_heap(heap.begin(), heap.end());
                if (known[i].n_seen == (int32_t) anchors.size()) {
                    heap.pop_back();
                    take(i);
                } else {
                    heap.back().first = worth(i);
                    std::push_heap(heap.begin(), heap.end());
                }
            }
            pass();
        }
        pass();

        std::vector<int32_t> res;
        for (int32_t i = 0; i < n; ++i) {
            if (has_place[i]) {
                res.push_back(i);
            }
        }
        return res;
    }

    // the kept cell nearest to place i, -1: none that may be joined
    int32_t nearest(int32_t i) const { return known[i].by; }

  private:
    struct nearest_anchor {
        float   distance = HUGE_VALF;
        int32_t by       = -1;
        int32_t n_seen   = 0;  // anchors looked at
    };

    const run &       r;
    const kv_points & points;
    const float *     score;
    const int32_t     n;

    std::vector<uint8_t>        has_place;
    std::vector<nearest_anchor> known;
    std::vector<int32_t>        anchors;  // cells that may be joined, in the order in which they were chosen
    anchor_block                block;    // a few of them
    int32_t                     n_taken  = 0;
    int32_t                     n_passed = 0;  // anchors that all cells have looked at

    void take(int32_t i) {
        has_place[i] = 1;
        n_taken++;
        if (!r.verbatim[i]) {
            anchors.push_back(i);
        }
    }

    int32_t highest_score() const {
        int32_t best = -1;
        for (int32_t i = 0; i < n; ++i) {
            if (!has_place[i] && (best < 0 || score[r.cells[i]] > score[r.cells[best]])) {
                best = i;
            }
        }
        return best;
    }

    void look(int32_t i, int32_t anchor) {
        const float distance = points.distance(i, anchors[anchor]);
        if (distance < known[i].distance) {
            known[i].distance = distance;
            known[i].by       = anchors[anchor];
        }
    }

    // shows all new anchors to all cells without a place
    void pass() {
        std::vector<int32_t> open;
        for (int32_t i = 0; i < n; ++i) {
            if (!has_place[i]) {
                open.push_back(i);
            }
        }
        const int32_t n_anchors = (int32_t) anchors.size();
        for (; n_passed < n_anchors; n_passed = std::min(n_passed + N_ANCHORS, n_anchors)) {
            const int32_t n_here = std::min(n_anchors - n_passed, N_ANCHORS);
            block.set(points, anchors.data() + n_passed, n_here);
            for (size_t first = 0; first < open.size(); first += N_CELLS) {
                show(open.data() + first, std::min((int32_t) (open.size() - first), N_CELLS), n_here);
            }
        }
    }

    void show(const int32_t * cells, int32_t n_cells, int32_t n_here) {
        float bounds[N_CELLS][N_ANCHORS];
        float than[N_CELLS];
        bool  any[N_CELLS];
        for (int32_t q = 0; q < n_cells; ++q) {
            than[q] = known[cells[q]].distance;
        }
        block.bound(points, cells, n_cells, than, bounds, any);

        for (int32_t q = 0; q < n_cells; ++q) {
            auto & cell = known[cells[q]];
            for (int32_t r = 0; any[q] && r < n_here; ++r) {
                if (bounds[q][r] < cell.distance && n_passed + r >= cell.n_seen) {
                    look(cells[q], n_passed + r);
                }
            }
            cell.n_seen = std::max(cell.n_seen, n_passed + n_here);
        }
    }

    double worth(int32_t i) {
        for (auto & seen = known[i].n_seen; seen < (int32_t) anchors.size(); ++seen) {
            look(i, seen);
        }
        const double distance = known[i].distance;
        return (double) score[r.cells[i]] * distance * std::sqrt(distance);
    }
};

}  // namespace

std::vector<uint8_t> coverage_selector::verbatim(int32_t n_keep, const cells & c) const {
    const int32_t n      = c.size();
    const int32_t n_most = n_keep / 4;

    std::vector<uint8_t> res(n, 0);
    int32_t              place   = 0;  // in its image
    int32_t              n_start = 0;
    for (int32_t i = 0; i < n; ++i) {
        if (!c.is_image(i)) {
            place  = 0;
            res[i] = n - i <= std::min(text_recent, n_most);
        } else if (place++ < image_start && n_start < n_most) {
            res[i] = 1;
            n_start++;
        }
    }
    if (c.has_past()) {  // the present question, half of all cells at most
        int32_t n_left = n_keep / 2;
        for (int32_t i = n - 1; i >= 0 && n_left > 0; --i) {
            if (!c.is_image(i) && !c.is_old(i)) {
                res[i] = 1;
                n_left--;
            }
        }
    }
    return res;
}

choice coverage_selector::choose(const run & r, const float * score, head_rows & rows) const {
    rows.space.fill(r.cells, rows.k, rows.d_k, rows.v, rows.d_v);
    chooser chosen(r, rows.space, score);
    choice  res;
    res.kept = chosen.choose();
    for (int32_t i = 0; i < (int32_t) r.cells.size(); ++i) {
        res.nearest.push_back(chosen.nearest(i));
    }
    return res;
}

}  // namespace elastic
