#include "core/coverage_selector.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace elastic {

namespace {

int64_t bits_of(double x) {
    int64_t res;
    std::memcpy(&res, &x, sizeof(res));
    return res;
}

// One run in one head. What a place is worth to a cell only shrinks as others get theirs, so a worth that was worked
// out earlier is a bound: only the cell of the highest one has to be brought up to date. All others are, once there
// are N_ANCHORS new anchors: many cells with a few anchors at a time stay in the cache.
class chooser {
  public:
    chooser(const run & r, const kv_points & points, const float * score)
        : r(r), points(points), score(score), n((int32_t) r.cells.size()), known(n),
          worth((size_t) (n + N_AT_ONCE) / N_AT_ONCE * N_AT_ONCE, TAKEN) {}

    // kept cells, indices in the run, ascending
    std::vector<int32_t> choose() {
        for (int32_t i = 0; i < n; ++i) {
            rate(i);
        }
        for (int32_t i = 0; i < n; ++i) {
            if (r.stay[i]) {
                take(i);
            }
        }
        if (anchors.empty() && n_taken < r.n_keep) {
            take(highest_score());
        }
        pass();
        while (n_taken < r.n_keep) {
            const int32_t i = highest_worth();
            if (known[i].n_seen < (int32_t) anchors.size()) {
                look_at_all(i);
                continue;
            }
            take(i);
            if ((int32_t) anchors.size() - n_passed == N_ANCHORS) {
                pass();
            }
        }
        pass();

        std::vector<int32_t> res;
        for (int32_t i = 0; i < n; ++i) {
            if (has_place(i)) {
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

    static constexpr double  TAKEN     = -1.0;  // below the worth of any cell without a place
    static constexpr int32_t N_AT_ONCE = 64;

    const run &       r;
    const kv_points & points;
    const float *     score;
    const int32_t     n;

    std::vector<nearest_anchor> known;
    std::vector<double>         worth;    // as of the anchors that a cell has looked at, to a multiple of N_AT_ONCE
    std::vector<int32_t>        anchors;  // cells that may be joined, in the order in which they were chosen
    anchor_block                block;    // a few of them
    int32_t                     n_taken  = 0;
    int32_t                     n_passed = 0;  // anchors that all cells have looked at

    bool has_place(int32_t i) const { return worth[i] == TAKEN; }

    void take(int32_t i) {
        worth[i] = TAKEN;
        n_taken++;
        if (!r.verbatim[i]) {
            anchors.push_back(i);
        }
    }

    int32_t highest_score() const {
        int32_t best = -1;
        for (int32_t i = 0; i < n; ++i) {
            if (!has_place(i) && (best < 0 || score[r.cells[i]] > score[r.cells[best]])) {
                best = i;
            }
        }
        return best;
    }

    // The earlier one of equals. The bits of numbers that are not below 0 have their order, and vectors have a maximum of those.
    int32_t highest_worth() const {
        int64_t best  = std::numeric_limits<int64_t>::min();
        int32_t first = 0;
        for (int32_t i = 0; i < n; i += N_AT_ONCE) {
            int64_t highest = best;
            for (int32_t j = i; j < i + N_AT_ONCE; ++j) {
                highest = std::max(highest, bits_of(worth[j]));
            }
            first = highest > best ? i : first;
            best  = highest;
        }
        while (bits_of(worth[first]) != best) {
            ++first;
        }
        return first;
    }

    void rate(int32_t i) {
        const double distance = known[i].distance;
        const float  by       = score[r.cells[i]];
        worth[i]              = by > 0.0f ? (double) by * distance * std::sqrt(distance) : 0.0;
    }

    bool look(int32_t i, int32_t anchor) {
        const float distance = points.distance(i, anchors[anchor]);
        const bool  nearer   = distance < known[i].distance;
        if (nearer) {
            known[i].distance = distance;
            known[i].by       = anchors[anchor];
        }
        return nearer;
    }

    void look_at_all(int32_t i) {
        bool nearer = false;
        for (auto & seen = known[i].n_seen; seen < (int32_t) anchors.size(); ++seen) {
            nearer |= look(i, seen);
        }
        if (nearer) {
            rate(i);
        }
    }

    // shows all new anchors to all cells without a place
    void pass() {
        std::vector<int32_t> open;
        for (int32_t i = 0; i < n; ++i) {
            if (!has_place(i)) {
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
            auto & cell   = known[cells[q]];
            bool   nearer = false;
            for (int32_t r = 0; any[q] && r < n_here; ++r) {
                if (bounds[q][r] < cell.distance && n_passed + r >= cell.n_seen) {
                    nearer |= look(cells[q], n_passed + r);
                }
            }
            if (nearer) {
                rate(cells[q]);
            }
            cell.n_seen = std::max(cell.n_seen, n_passed + n_here);
        }
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
