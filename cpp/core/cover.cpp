#include "core/cover.h"

#include "core/parallel.h"
#include "core/select.h"

#include <algorithm>
#include <cmath>

namespace elastic {

namespace {

constexpr int32_t N_BLOCK = 64;  // cells side by side, so that a distance to all of them fills vector registers

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
        : n((int32_t) run.cells.size()), d(d_k + d_v), data((size_t) n_blocks() * d * N_BLOCK, 0.0f) {
        put(run, k, d_k, 0, 1.0f);
        put(run, v, d_v, d_k, value_weight);
    }

    // lowers nearest[i] to the distance between cells i and j where that is less; by[i] = j there
    void lower(int32_t j, float * nearest, int32_t * by) const {
        std::vector<float> own(d);
        for (int32_t e = 0; e < d; ++e) {
            own[e] = data[at(j, e)];
        }
        for (int32_t b = 0; b < n_blocks(); ++b) {
            const float * block         = data.data() + (size_t) b * d * N_BLOCK;
            float         dist[N_BLOCK] = {};
            for (int32_t e = 0; e < d; ++e) {
                const float   x = own[e];
                const float * y = block + (size_t) e * N_BLOCK;
                for (int32_t i = 0; i < N_BLOCK; ++i) {
                    dist[i] += (y[i] - x) * (y[i] - x);
                }
            }
            const int32_t n_here = std::min(N_BLOCK, n - b * N_BLOCK);
            for (int32_t i = 0; i < n_here; ++i) {
                if (dist[i] < nearest[b * N_BLOCK + i]) {
                    nearest[b * N_BLOCK + i] = dist[i];
                    by[b * N_BLOCK + i]      = j;
                }
            }
        }
    }

  private:
    const int32_t      n;
    const int32_t      d;
    std::vector<float> data;  // [n_blocks][d][N_BLOCK]

    int32_t n_blocks() const { return (n + N_BLOCK - 1) / N_BLOCK; }
    size_t  at(int32_t i, int32_t e) const { return ((size_t) (i / N_BLOCK) * d + e) * N_BLOCK + i % N_BLOCK; }

    void put(const image_run & run, const std::vector<float> & x, int32_t d_x, int32_t first, float weight) {
        double variance = 0.0;
        for (int32_t e = 0; e < d_x; ++e) {
            double sum = 0.0;
            double sq  = 0.0;
            for (const int32_t i : run.cells) {
                const double y = x[(size_t) i * d_x + e];
                sum += y;
                sq += y * y;
            }
            variance += std::max(0.0, sq / n - (sum / n) * (sum / n));
        }
        const float scale = variance > 0.0 ? (float) std::sqrt(weight / variance) : 0.0f;
        for (int32_t i = 0; i < n; ++i) {
            for (int32_t e = 0; e < d_x; ++e) {
                data[at(i, first + e)] = scale * x[(size_t) run.cells[i] * d_x + e];
            }
        }
    }
};

// one run in one head: places in run.cells that are kept, ascending, and for every place the kept one nearest to it
// (-1: none that may be joined)
std::vector<int32_t> choose(const image_run & run, const cells & c, const features & f, const float * score, std::vector<int32_t> & by) {
    const int32_t n = (int32_t) run.cells.size();

    std::vector<float>   nearest(n, HUGE_VALF);
    std::vector<uint8_t> has_place(n, 0);
    std::vector<int32_t> res;
    by.assign(n, -1);

    const auto take = [&](int32_t i) {
        has_place[i] = 1;
        res.push_back(i);
        if (!c.pinned[run.cells[i]]) {
            f.lower(i, nearest.data(), by.data());
        }
    };
    for (const int32_t i : run.protect) {
        take(i);
    }
    while ((int32_t) res.size() < run.n_keep) {
        int32_t best  = -1;
        double  worth = -1.0;
        for (int32_t i = 0; i < n; ++i) {
            const double s = score[run.cells[i]];
            const double x = s * (std::isinf(nearest[i]) ? 1.0 : nearest[i]);
            if (!has_place[i] && x > worth) {
                worth = x;
                best  = i;
            }
        }
        take(best);
    }
    std::sort(res.begin(), res.end());
    return res;
}

}  // namespace

void cover_images(const plan_params & params, const cells & c, const head_map & score, const row_source & rows, plan & p,
                  int32_t n_threads) {
    const auto    runs = find_runs(params, c, p);
    const int32_t d_k  = rows.n_embd_head_k();
    const int32_t d_v  = rows.n_embd_head_v();

    p.bucket.assign((size_t) p.n_layer * p.n_head_kv * p.n_cells, -1);

    parallel_for(p.n_layer, n_threads, [&](int32_t il) {
        std::vector<float>   k((size_t) c.size() * d_k);
        std::vector<float>   v((size_t) c.size() * d_v);
        std::vector<int32_t> by;

        for (int32_t ih = 0; ih < p.n_head_kv; ++ih) {
            rows.load_k(il, ih, k.data());
            rows.load_v(il, ih, v.data());

            int32_t * kept   = p.kept.data() + ((size_t) il * p.n_head_kv + ih) * p.n_keep;
            int32_t * bucket = p.bucket.data() + ((size_t) il * p.n_head_kv + ih) * p.n_cells;
            for (const auto & run : runs) {
                const auto           chosen = choose(run, c, features(run, k, d_k, v, d_v), score.row(il, ih), by);
                std::vector<int32_t> rank(run.cells.size(), -1);
                for (size_t j = 0; j < chosen.size(); ++j) {
                    rank[chosen[j]]     = run.first + (int32_t) j;
                    kept[run.first + j] = run.cells[chosen[j]];
                }
                for (size_t i = 0; i < run.cells.size(); ++i) {
                    if (rank[i] < 0 && by[i] >= 0) {
                        bucket[run.cells[i]] = rank[by[i]];
                    }
                }
            }
        }
    });
}

}  // namespace elastic
