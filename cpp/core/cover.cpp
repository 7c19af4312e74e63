#include "core/cover.h"

#include "core/features.h"
#include "core/layers.h"
#include "core/parallel.h"
#include "core/select.h"

#include <algorithm>
#include <cmath>
#include <numeric>

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

// the run without the cells that a layer does without; so far its protected cells stay
open_run run_of_layer(const open_run & run, const cells & c, int32_t il) {
    open_run res;
    res.image = run.image;
    res.first = run.first;
    for (size_t k = 0; k < run.cells.size(); ++k) {
        if (!c.is_absent(il, run.cells[k])) {
            res.cells.push_back(run.cells[k]);
            res.protect.push_back(run.protect[k]);
            res.closed.push_back(run.closed[k]);
            res.n_protect += run.protect[k];
        }
    }
    res.n_keep = res.n_protect;
    return res;
}

// the run as each layer has it, on average with what is meant for it and n_more cells, or fewer where there are not as many; in none
// with more than `most` times what is meant for it, the protected cells aside  [n_layer]
std::vector<open_run> share_run(const open_run & run, const cells & c, const std::vector<float> & share, int32_t n_more, double most) {
    const int32_t n_free = run.n_keep - run.n_protect;
    const auto    limit  = (int32_t) std::min((double) run.cells.size(), n_free * most);

    std::vector<open_run> res;
    std::vector<int32_t>  room;
    for (size_t il = 0; il < share.size(); ++il) {
        res.push_back(run_of_layer(run, c, (int32_t) il));
        room.push_back(std::min(limit, (int32_t) res.back().cells.size() - res.back().n_protect));
    }
    const auto places = places_of_layers(n_free + n_more, share, room);
    for (size_t il = 0; il < share.size(); ++il) {
        res[il].n_keep += places[il];
    }
    return res;
}

// All runs as each layer has them, n_keep cells on average. What is meant for a run of which layers hold fewer goes to the
// others  [runs][n_layer]
std::vector<std::vector<open_run>> share_runs(const plan_params & params, const cells & c, int32_t n_layer,
                                              const std::vector<open_run> & runs) {
    const std::vector<float> share = params.layer_share.empty() ? std::vector<float>(n_layer, 1.0f) : params.layer_share;
    const double             most  = params.n_rank_max > 0 ? std::max(1.0, (double) params.n_rank_max / params.n_keep) : HUGE_VAL;

    std::vector<uint8_t> whole(c.size(), 1);  // cells of runs that stay whole
    int64_t              n_left = (int64_t) params.n_keep * n_layer;
    const auto           n_held = [&](const std::vector<open_run> & of_layers) {
        return std::accumulate(of_layers.begin(), of_layers.end(), (int64_t) 0,
                                         [](int64_t n, const open_run & own) { return n + own.n_keep; });
    };

    std::vector<std::vector<open_run>> res;
    for (const auto & run : runs) {
        res.push_back(share_run(run, c, share, 0, most));
        n_left -= n_held(res.back());
        for (const int32_t i : run.cells) {
            whole[i] = 0;
        }
    }
    for (int32_t i = 0; i < c.size(); ++i) {
        for (int32_t il = 0; whole[i] && il < n_layer; ++il) {
            n_left -= !c.is_absent(il, i);
        }
    }
    for (size_t r = 0; r < runs.size() && !c.absent.empty() && n_left >= n_layer; ++r) {
        const int64_t before = n_held(res[r]);
        res[r]               = share_run(runs[r], c, share, (int32_t) (n_left / n_layer), most);
        n_left -= n_held(res[r]) - before;
    }
    return res;
}

// Ranks of a run: as many as the layer that keeps most of it. The protected cells that it ends with have the last ranks in every
// layer, since they are the newest in each; a layer that keeps fewer does without those before them.
struct run_ranks {
    int32_t              first;   // rank of its first kept cell
    int32_t              n_body;  // ranks before those of the tail
    std::vector<int32_t> tail;    // protected cells at its end that some layer holds, ascending

    int32_t n_keep() const { return n_body + (int32_t) tail.size(); }
    // -1: not of the tail
    int32_t tail_rank(int32_t cell) const {
        const auto it = std::lower_bound(tail.begin(), tail.end(), cell);
        return it != tail.end() && *it == cell ? first + n_body + (int32_t) (it - tail.begin()) : -1;
    }
};

bool held_by_any(const cells & c, int32_t n_layer, int32_t cell) {
    for (int32_t il = 0; il < n_layer; ++il) {
        if (!c.is_absent(il, cell)) {
            return true;
        }
    }
    return false;
}

run_ranks rank_run(const open_run & run, const std::vector<open_run> & of_layers, const cells & c, int32_t first) {
    run_ranks res = { first, 0, {} };
    for (size_t k = run.cells.size(); k > 0 && run.protect[k - 1]; --k) {
        if (held_by_any(c, (int32_t) of_layers.size(), run.cells[k - 1])) {
            res.tail.insert(res.tail.begin(), run.cells[k - 1]);
        }
    }
    for (const auto & own : of_layers) {
        const auto n_tail = std::count_if(own.cells.begin(), own.cells.end(), [&](int32_t cell) { return res.tail_rank(cell) >= 0; });
        res.n_body        = std::max(res.n_body, own.n_keep - (int32_t) n_tail);
    }
    return res;
}

// makes room in the plan for the ranks of all runs; cells of other runs that a layer does without lose their ranks
std::vector<run_ranks> widen(plan & p, const cells & c, const std::vector<open_run> & runs,
                             const std::vector<std::vector<open_run>> & of_layers) {
    std::vector<run_ranks> res;
    std::vector<int32_t>   from;  // rank before, -1: of an open run  [n_keep]
    int32_t                next = 0;

    // a run that is kept whole has the same cell at a rank in all layers and heads
    const auto keep_until = [&](int32_t last) {
        for (; next < last; ++next) {
            if (held_by_any(c, p.n_layer, p.kept[next])) {
                from.push_back(next);
            }
        }
    };
    for (size_t r = 0; r < runs.size(); ++r) {
        keep_until(runs[r].first);
        res.push_back(rank_run(runs[r], of_layers[r], c, (int32_t) from.size()));
        from.insert(from.end(), res.back().n_keep(), -1);
        next += runs[r].n_keep;
    }
    keep_until(p.n_keep);

    std::vector<int32_t> kept;
    for (int32_t il = 0; il < p.n_layer; ++il) {
        for (int32_t ih = 0; ih < p.n_head_kv; ++ih) {
            for (const int32_t j : from) {
                const int32_t cell = j < 0 ? -1 : p.kept_row(il, ih)[j];
                kept.push_back(cell < 0 || c.is_absent(il, cell) ? -1 : cell);
            }
        }
    }
    p.n_keep = (int32_t) from.size();
    p.kept   = std::move(kept);
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

    // Text of earlier turns is lost rather than merged: merged, it draws attention that the image needs. Chosen on 12 conversations of
    // the dev split (embedded model, budget 0.2): captions after five questions 108 of 108 objects right, merged 88; questions 43 and 40
    // of 48
    const bool past = c.has_past();

    const auto of_layers = share_runs(params, c, p.n_layer, runs);
    const auto ranks     = widen(p, c, runs, of_layers);

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
            for (size_t r = 0; r < runs.size(); ++r) {
                const auto & run = of_layers[r][il];
                f.fill(run.cells, k, d_k, v, d_v);
                chooser              places(run, f, score.row(il, ih));
                std::vector<int32_t> rank(run.cells.size(), -1);
                int32_t              next = ranks[r].first;
                for (const int32_t i : places.choose()) {
                    const int32_t cell = run.cells[i];
                    const int32_t last = ranks[r].tail_rank(cell);
                    rank[i]            = last >= 0 ? last : next++;
                    kept[rank[i]]      = cell;
                }
                for (size_t i = 0; i < run.cells.size(); ++i) {
                    const int32_t by = rank[i] < 0 && (run.image || !past) ? places.nearest((int32_t) i) : -1;
                    if (by >= 0) {
                        bucket[run.cells[i]] = rank[by];
                    }
                }
            }
        }
    });
}

}  // namespace elastic
