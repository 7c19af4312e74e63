#include "core/cover.h"

#include "core/parallel.h"
#include "core/select.h"

#include <algorithm>
#include <cmath>

namespace elastic {

namespace {

// a run of image cells, the same for all layers and heads
struct image_run {
    std::vector<int32_t> cells;       // logical indices, ascending
    std::vector<int32_t> protect;     // places in `cells`
    int32_t              first  = 0;  // rank of its first kept cell
    int32_t              n_keep = 0;
};

std::vector<image_run> find_runs(const plan_params & params, const cells & c, const plan & p) {
    const auto protect = protected_cells(select_rule::image_cover, params, c);

    std::vector<image_run> res;
    for (int32_t i = 0; i < c.size(); ++i) {
        if (c.kind[i] != cell_kind::image) {
            continue;
        }
        if (i == 0 || c.kind[i - 1] != cell_kind::image) {
            res.emplace_back();
        }
        auto & run = res.back();
        if (protect[i]) {
            run.protect.push_back((int32_t) run.cells.size());
        }
        run.cells.push_back(i);
    }

    // ranks are in logical order and a run keeps as many cells in every head: the first head tells where
    const int32_t * kept = p.kept_row(0, 0);
    for (auto & run : res) {
        const int32_t * lo = std::lower_bound(kept, kept + p.n_keep, run.cells.front());
        const int32_t * hi = std::upper_bound(kept, kept + p.n_keep, run.cells.back());
        run.first          = (int32_t) (lo - kept);
        run.n_keep         = (int32_t) (hi - lo);
    }
    return res;
}

// keys and values of a run side by side, scaled so that squared distances are the ones of cover.h
class features {
  public:
    features(const image_run & run, const std::vector<float> & k, int32_t d_k, const std::vector<float> & v, int32_t d_v)
        : n((int32_t) run.cells.size()), d((d_k + d_v + N_LANES - 1) / N_LANES * N_LANES), data((size_t) n * d, 0.0f) {
        put(run, k, d_k, 0, 1.0f);
        put(run, v, d_v, d_k, value_weight);
    }

    // squared distance between two cells; something above `bound` where it is above it
    float distance(int32_t i, int32_t j, float bound) const {
        const float * x = data.data() + (size_t) i * d;
        const float * y = data.data() + (size_t) j * d;

        float sum = 0.0f;
        for (int32_t e = 0; e < d && sum <= bound; e += N_LANES) {
            float lanes[N_LANES / 4] = {};
            for (int32_t part = 0; part < N_LANES; part += N_LANES / 4) {
                for (int32_t l = 0; l < N_LANES / 4; ++l) {
                    const float diff = x[e + part + l] - y[e + part + l];
                    lanes[l] += diff * diff;
                }
            }
            for (const float lane : lanes) {
                sum += lane;
            }
        }
        return sum;
    }

  private:
    static constexpr int32_t N_LANES = 64;  // elements between two looks at the bound

    const int32_t      n;
    const int32_t      d;
    std::vector<float> data;  // [n][d]

    void put(const image_run & run, const std::vector<float> & x, int32_t d_x, int32_t first, float weight) {
        std::vector<double> sum(d_x, 0.0);
        std::vector<double> sq(d_x, 0.0);
        for (const int32_t i : run.cells) {
            for (int32_t e = 0; e < d_x; ++e) {
                const double y = x[(size_t) i * d_x + e];
                sum[e] += y;
                sq[e] += y * y;
            }
        }
        double variance = 0.0;
        for (int32_t e = 0; e < d_x; ++e) {
            variance += std::max(0.0, sq[e] / n - (sum[e] / n) * (sum[e] / n));
        }
        const float scale = variance > 0.0 ? (float) std::sqrt(weight / variance) : 0.0f;
        for (int32_t i = 0; i < n; ++i) {
            for (int32_t e = 0; e < d_x; ++e) {
                data[(size_t) i * d + first + e] = scale * x[(size_t) run.cells[i] * d_x + e];
            }
        }
    }
};

// One run in one head. What a place is worth to a cell only shrinks as others get theirs, so a worth that was worked
// out earlier is a bound: only the cell at the top of the heap has to be brought up to date.
class chooser {
  public:
    chooser(const image_run & run, const cells & c, const features & f, const float * score)
        : run(run), c(c), f(f), score(score), has_place(run.cells.size(), 0), known(run.cells.size()) {}

    // places in run.cells that are kept, ascending
    std::vector<int32_t> choose() {
        for (const int32_t i : run.protect) {
            take(i);
        }
        if (anchors.empty() && n_taken < run.n_keep) {
            take(highest_score());
        }
        std::vector<std::pair<double, int32_t>> heap;  // (worth, -place): ties to the earlier cell
        if (n_taken < run.n_keep) {
            for (int32_t i = 0; i < (int32_t) run.cells.size(); ++i) {
                if (!has_place[i]) {
                    heap.emplace_back(worth(i), -i);
                }
            }
        }
        std::make_heap(heap.begin(), heap.end());
        while (n_taken < run.n_keep) {
            const int32_t i = -heap.front().second;
            std::pop_heap(heap.begin(), heap.end());
            if (known[i].n_seen == anchors.size()) {
                heap.pop_back();
                take(i);
            } else {
                heap.back().first = worth(i);
                std::push_heap(heap.begin(), heap.end());
            }
        }
        std::vector<int32_t> res;
        for (int32_t i = 0; i < (int32_t) run.cells.size(); ++i) {
            if (has_place[i]) {
                res.push_back(i);
            }
        }
        return res;
    }

    // the kept cell nearest to place i, -1: none that may be joined
    int32_t nearest(int32_t i) {
        update(i);
        return known[i].by;
    }

  private:
    struct nearest_anchor {
        float   distance = HUGE_VALF;
        int32_t by       = -1;
        size_t  n_seen   = 0;  // anchors looked at
    };

    const image_run & run;
    const cells &     c;
    const features &  f;
    const float *     score;

    std::vector<uint8_t>        has_place;
    std::vector<nearest_anchor> known;
    std::vector<int32_t>        anchors;  // cells that may be joined, in the order in which they got their places
    int32_t                     n_taken = 0;

    void take(int32_t i) {
        has_place[i] = 1;
        n_taken++;
        if (!c.pinned[run.cells[i]]) {
            anchors.push_back(i);
        }
    }

    int32_t highest_score() const {
        int32_t best = -1;
        for (int32_t i = 0; i < (int32_t) run.cells.size(); ++i) {
            if (!has_place[i] && (best < 0 || score[run.cells[i]] > score[run.cells[best]])) {
                best = i;
            }
        }
        return best;
    }

    void update(int32_t i) {
        auto & x = known[i];
        for (; x.n_seen < anchors.size(); ++x.n_seen) {
            const float distance = f.distance(i, anchors[x.n_seen], x.distance);
            if (distance < x.distance) {
                x.distance = distance;
                x.by       = anchors[x.n_seen];
            }
        }
    }

    double worth(int32_t i) {
        update(i);
        return (double) score[run.cells[i]] * known[i].distance;
    }
};

}  // namespace

void cover_images(const plan_params & params, const cells & c, const head_map & score, const row_source & rows, plan & p,
                  int32_t n_threads) {
    const auto    runs = find_runs(params, c, p);
    const int32_t d_k  = rows.n_embd_head_k();
    const int32_t d_v  = rows.n_embd_head_v();

    p.bucket.assign((size_t) p.n_layer * p.n_head_kv * p.n_cells, -1);

    parallel_for(p.n_layer, n_threads, [&](int32_t il) {
        std::vector<float> k((size_t) c.size() * d_k);
        std::vector<float> v((size_t) c.size() * d_v);

        for (int32_t ih = 0; ih < p.n_head_kv; ++ih) {
            rows.load_k(il, ih, k.data());
            rows.load_v(il, ih, v.data());

            int32_t * kept   = p.kept.data() + ((size_t) il * p.n_head_kv + ih) * p.n_keep;
            int32_t * bucket = p.bucket.data() + ((size_t) il * p.n_head_kv + ih) * p.n_cells;
            for (const auto & run : runs) {
                const features       f(run, k, d_k, v, d_v);
                chooser              places(run, c, f, score.row(il, ih));
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
