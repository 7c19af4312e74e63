#include "core/cover.h"

#include "core/parallel.h"
#include "core/select.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
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

// as many anchors are compared at once with as many cells
#ifdef __AVX512F__
constexpr int32_t N_ANCHORS = 16;
#else
constexpr int32_t N_ANCHORS = 8;
#endif
constexpr int32_t N_CELLS = 8;

// inner products of N_CELLS cells with N_ANCHORS anchors, whose elements lie side by side: [d][N_ANCHORS]
#ifdef __GNUC__
typedef float lanes __attribute__((vector_size(N_ANCHORS * sizeof(float))));

void inner_products(const float * const * cells, const float * anchors, int32_t d, float (*dst)[N_ANCHORS]) {
    lanes sum[N_CELLS] = {};
    for (int32_t e = 0; e < d; ++e) {
        lanes y;
        std::memcpy(&y, anchors + (size_t) e * N_ANCHORS, sizeof(y));
        for (int32_t q = 0; q < N_CELLS; ++q) {
            sum[q] += cells[q][e] * y;
        }
    }
    std::memcpy(dst, sum, sizeof(sum));
}
#else
void inner_products(const float * const * cells, const float * anchors, int32_t d, float (*dst)[N_ANCHORS]) {
    for (int32_t q = 0; q < N_CELLS; ++q) {
        std::fill(dst[q], dst[q] + N_ANCHORS, 0.0f);
        for (int32_t e = 0; e < d; ++e) {
            for (int32_t r = 0; r < N_ANCHORS; ++r) {
                dst[q][r] += cells[q][e] * anchors[(size_t) e * N_ANCHORS + r];
            }
        }
    }
}
#endif

// keys and values of a run side by side, moved and scaled so that squared distances are the ones of cover.h
class features {
  public:
    // memory is kept from run to run
    void fill(const open_run & run, const std::vector<float> & k, int32_t d_k, const std::vector<float> & v, int32_t d_v) {
        n = (int32_t) run.cells.size();
        d = (d_k + d_v + N_LANES - 1) / N_LANES * N_LANES;
        data.assign((size_t) n * d, 0.0f);
        norms.resize(n);
        put(run, k, d_k, 0);
        put(run, v, d_v, d_k);
        for (int32_t i = 0; i < n; ++i) {
            norms[i] = squared(i);
        }
    }

    const float * row(int32_t i) const { return data.data() + (size_t) i * d; }
    float         norm(int32_t i) const { return norms[i]; }
    int32_t       size() const { return d; }

    // squared distance between two cells
    float distance(int32_t i, int32_t j) const {
        const float * x             = row(i);
        const float * y             = row(j);
        float         sums[N_LANES] = {};
        for (int32_t e = 0; e < d; e += N_LANES) {
            for (int32_t l = 0; l < N_LANES; ++l) {
                const float diff = x[e + l] - y[e + l];
                sums[l] += diff * diff;
            }
        }
        return std::accumulate(sums, sums + N_LANES, 0.0f);
    }

  private:
    static constexpr int32_t N_LANES = 16;  // sums side by side

    float squared(int32_t i) const {
        const float * x             = row(i);
        float         sums[N_LANES] = {};
        for (int32_t e = 0; e < d; e += N_LANES) {
            for (int32_t l = 0; l < N_LANES; ++l) {
                sums[l] += x[e + l] * x[e + l];
            }
        }
        return std::accumulate(sums, sums + N_LANES, 0.0f);
    }

    int32_t            n = 0;
    int32_t            d = 0;
    std::vector<float> data;   // [n][d]
    std::vector<float> norms;  // squared, [n]

    void put(const open_run & run, const std::vector<float> & x, int32_t d_x, int32_t first) {
        std::vector<double> mean(d_x, 0.0);
        std::vector<double> sq(d_x, 0.0);
        for (const int32_t i : run.cells) {
            for (int32_t e = 0; e < d_x; ++e) {
                const double y = x[(size_t) i * d_x + e];
                mean[e] += y;
                sq[e] += y * y;
            }
        }
        double variance = 0.0;
        for (int32_t e = 0; e < d_x; ++e) {
            mean[e] /= n;
            variance += std::max(0.0, sq[e] / n - mean[e] * mean[e]);
        }
        const float scale = variance > 0.0 ? (float) std::sqrt(1.0 / variance) : 0.0f;
        for (int32_t i = 0; i < n; ++i) {
            for (int32_t e = 0; e < d_x; ++e) {
                data[(size_t) i * d + first + e] = scale * (x[(size_t) run.cells[i] * d_x + e] - (float) mean[e]);
            }
        }
    }
};

// One run in one head. What a place is worth to a cell only shrinks as others get theirs, so a worth that was worked
// out earlier is a bound: only the cell at the top of the heap has to be brought up to date. All others are, once there
// are N_ANCHORS new anchors: many cells with a few anchors at a time stay in the cache.
class chooser {
  public:
    chooser(const open_run & run, const features & f, const float * score)
        : run(run), f(f), score(score), n((int32_t) run.cells.size()), has_place(n, 0), known(n),
          side_by_side((size_t) N_ANCHORS * f.size(), 0.0f) {}

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
    std::vector<int32_t>        anchors;       // cells that may be joined, in the order in which they got their places
    std::vector<float>          side_by_side;  // features of a few of them, [d][N_ANCHORS]
    float                       anchor_norms[N_ANCHORS];
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
            std::fill(anchor_norms, anchor_norms + N_ANCHORS, FLT_MAX);
            for (int32_t r = 0; r < n_here; ++r) {
                const float * row = f.row(anchors[n_passed + r]);
                anchor_norms[r]   = slack() * f.norm(anchors[n_passed + r]);
                for (int32_t e = 0; e < f.size(); ++e) {
                    side_by_side[(size_t) e * N_ANCHORS + r] = row[e];
                }
            }
            for (size_t first = 0; first < open.size(); first += N_CELLS) {
                show(open.data() + first, std::min((int32_t) (open.size() - first), N_CELLS), n_here);
            }
        }
    }

    // |x|^2 + |y|^2 - 2xy is quick but not exact, so it only tells which anchors are worth a look
    void show(const int32_t * cells, int32_t n_cells, int32_t n_here) {
        const float * x[N_CELLS];
        for (int32_t q = 0; q < N_CELLS; ++q) {
            x[q] = f.row(cells[std::min(q, n_cells - 1)]);
        }
        float products[N_CELLS][N_ANCHORS];
        inner_products(x, side_by_side.data(), f.size(), products);

        for (int32_t q = 0; q < n_cells; ++q) {
            auto &      cell = known[cells[q]];
            const float norm = slack() * f.norm(cells[q]);
            const auto  near = [&](int32_t r) {
                return norm + anchor_norms[r] - 2.0f * products[q][r] < cell.distance;
            };
            int32_t any = 0;  // mostly none: a loop without branches tells
            for (int32_t r = 0; r < N_ANCHORS; ++r) {
                any |= near(r);
            }
            for (int32_t r = 0; any && r < n_here; ++r) {
                if (near(r) && n_passed + r >= cell.n_seen) {
                    look(cells[q], n_passed + r);
                }
            }
            cell.n_seen = std::max(cell.n_seen, n_passed + n_here);
        }
    }

    // more than the rounding of a quick distance
    float slack() const { return 1.0f - 2.0f * (float) f.size() * FLT_EPSILON; }

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
                f.fill(run, k, d_k, v, d_v);
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
