#include "core/cover.h"

#include "core/features.h"
#include "core/parallel.h"
#include "core/select.h"

#include <algorithm>
#include <cmath>

namespace elastic {

namespace {

// a run of which some cells have to go
struct open_run : segment {
    std::vector<uint8_t> closed;  // [cells], 1: none may join it
    int32_t              first;   // rank of its first kept cell
};

std::vector<open_run> find_runs(const plan_params & params, const cells & c) {
    const auto protect = protected_cells(select_rule::cover, params, c);
    const auto apart   = cells_apart(params, c);

    std::vector<open_run> res;
    int32_t               first = 0;
    for (auto & s : shared_segments(select_rule::cover, c, protect, params.n_keep)) {
        const int32_t n_keep = s.n_keep;
        if (n_keep < (int32_t) s.cells.size()) {
            std::vector<uint8_t> closed;
            for (const int32_t i : s.cells) {
                closed.push_back(c.pinned[i] || apart[i]);
            }
            res.push_back({ std::move(s), std::move(closed), first });
        }
        first += n_keep;
    }
    return res;
}

// One run in one head. What a place is worth to a cell only shrinks as others get theirs, so a worth that was worked
// out earlier is a bound: only the cell at the top of the heap has to be brought up to date. All others are, once there
// are N_ANCHORS new anchors: many cells with a few anchors at a time stay in the cache.
class chooser {
  public:
    chooser(const open_run & run, const features & f, const float * score)
        : run(run), f(f), score(score), n((int32_t) run.cells.size()), has_place(n, 0), known(n) {}

    // places in run.cells that are kept, ascending
    std::vector<int32_t> choose() {
        for (int32_t i = 0; i < n; ++i) {
            if (run.protect[i]) {
                take(i);
            }
        }
        if (anchors.empty() && n_taken < run.n_keep) {
            take(highest_score());
        }
        while (n_taken < run.n_keep) {
            std::vector<std::pair<double, int32_t>> heap;  // (worth, -place): ties to the earlier cell
            for (int32_t i = 0; i < n; ++i) {
                if (!has_place[i]) {
                    heap.emplace_back(worth(i), -i);
                }
            }
            std::make_heap(heap.begin(), heap.end());
            while (n_taken < run.n_keep && (int32_t) anchors.size() - n_passed < N_ANCHORS) {
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

    const open_run & run;
    const features & f;
    const float *    score;
    const int32_t    n;

    std::vector<uint8_t>        has_place;
    std::vector<nearest_anchor> known;
    std::vector<int32_t>        anchors;  // cells that may be joined, in the order in which they got their places
    anchor_block                block;    // a few of them
    int32_t                     n_taken  = 0;
    int32_t                     n_passed = 0;  // anchors that all cells have looked at

    void take(int32_t i) {
        has_place[i] = 1;
        n_taken++;
        if (!run.closed[i]) {
            anchors.push_back(i);
        }
    }

    int32_t highest_score() const {
        int32_t best = -1;
        for (int32_t i = 0; i < n; ++i) {
            if (!has_place[i] && (best < 0 || score[run.cells[i]] > score[run.cells[best]])) {
                best = i;
            }
        }
        return best;
    }

    void look(int32_t i, int32_t anchor) {
        const float distance = f.distance(i, anchors[anchor]);
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
            block.set(f, anchors.data() + n_passed, n_here);
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
        block.bound(f, cells, n_cells, than, bounds, any);

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
        return (double) score[run.cells[i]] * distance * std::sqrt(distance);
    }
};

}  // namespace

void cover_runs(const plan_params & params, const cells & c, const head_map & score, const row_source & rows, plan & p, int32_t n_threads) {
    const auto    runs = find_runs(params, c);
    const int32_t d_k  = rows.n_embd_head_k();
    const int32_t d_v  = rows.n_embd_head_v();

    p.bucket.assign((size_t) p.n_layer * p.n_head_kv * p.n_cells, -1);

    parallel_for(p.n_layer, n_threads, [&](int32_t il) {
        std::vector<float> k((size_t) c.size() * d_k);
        std::vector<float> v((size_t) c.size() * d_v);
        features           f;

        for (int32_t ih = 0; ih < p.n_head_kv; ++ih) {
            rows.load_k(il, ih, k.data());
            rows.load_v(il, ih, v.data());

            int32_t * kept   = p.kept.data() + ((size_t) il * p.n_head_kv + ih) * p.n_keep;
            int32_t * bucket = p.bucket.data() + ((size_t) il * p.n_head_kv + ih) * p.n_cells;
            for (const auto & run : runs) {
                f.fill(run.cells, k, d_k, v, d_v);
                chooser              places(run, f, score.row(il, ih));
                const auto           chosen = places.choose();
                std::vector<int32_t> rank(run.cells.size(), -1);
                for (size_t j = 0; j < chosen.size(); ++j) {
                    rank[chosen[j]]     = run.first + (int32_t) j;
                    kept[run.first + j] = run.cells[chosen[j]];
                }
                for (size_t i = 0; i < run.cells.size(); ++i) {
                    const int32_t by = rank[i] < 0 ? places.nearest((int32_t) i) : -1;
                    if (by >= 0) {
                        bucket[run.cells[i]] = rank[by];
                    }
                }
            }
        }
    });
}

}  // namespace elastic
