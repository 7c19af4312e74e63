#include "kernels/attention_prefill.h"

#include "kernels/attention_decode.h"
#include "kernels/kv_rows.h"
#include "kernels/simd.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

namespace elastic {

namespace {

constexpr int32_t N_GROUP = 64;                // queries that are finished together
constexpr int32_t N_PARTS = N_GROUP / N_SIMD;  // registers that they take
constexpr int32_t N_TILE  = 8;                 // sums that are kept in registers
constexpr int32_t N_CHUNK = 32;                // cells that stay in the first cache

constexpr int64_t N_FEW = 8;  // queries that see a cell up to which they are few, on average

typedef uint64_t query_set;  // a bit per query of a group

// the same for all heads
struct query_group {
    int32_t                                  first;
    int32_t                                  n;
    std::vector<query_set>                   may_see;  // [n_kv]
    std::vector<std::pair<int32_t, int32_t>> runs;     // cells that some query sees
};

std::vector<query_group> read_mask(const attention & a) {
    std::vector<query_group> res;
    for (int32_t first = 0; first < a.n_q; first += N_GROUP) {
        query_group g = { first, std::min(N_GROUP, a.n_q - first), std::vector<query_set>(a.n_kv, 0), {} };
        for (int32_t i = 0; i < g.n; ++i) {
            const int64_t row = (first + i) * a.mask_stride;
            for (int32_t c = 0; c < a.n_kv; ++c) {
                const bool open =
                    a.mask_type == GGML_TYPE_F16 ? ((const ggml_fp16_t *) a.mask)[row + c] == 0 : ((const float *) a.mask)[row + c] == 0.0f;
                g.may_see[c] |= (query_set) open << i;
            }
        }
        for (int32_t c = 0; a.bias && c < a.n_kv; ++c) {
            g.may_see[c] = a.bias[c] == -INFINITY ? 0 : g.may_see[c];
        }
        for (int32_t c = 0; c < a.n_kv; c += N_CHUNK) {
            const int32_t end = std::min(a.n_kv, c + N_CHUNK);
            if (std::any_of(g.may_see.begin() + c, g.may_see.begin() + end, [](query_set s) { return s != 0; })) {
                g.runs.emplace_back(c, end);
            }
        }
        res.push_back(std::move(g));
    }
    return res;
}

seen_cells cells_of(const query_group & g) {
    seen_cells res(g.n);
    for (const auto & [begin, end] : g.runs) {
        for (int32_t c = begin; c < end; ++c) {
            for (int32_t i = 0; i < g.n; ++i) {
                if (g.may_see[c] >> i & 1) {
                    res[i].push_back(c);
                }
            }
        }
    }
    return res;
}

// do few queries see the same cells?
bool are_few(const seen_cells & seen, const query_group & g) {
    int64_t n_seen = 0;
    for (const auto & cells : seen) {
        n_seen += (int64_t) cells.size();
    }
    return n_seen <= N_FEW * std::count_if(g.may_see.begin(), g.may_see.end(), [](query_set s) { return s != 0; });
}

class head_attention {
  public:
    head_attention(const attention & a, const std::vector<query_group> & groups)
        : a(a), d_k(a.k.n_embd_head), d_v(a.v.n_embd_head), n_blocks((d_v + N_SIMD - 1) / N_SIMD), all(a.n_kv), groups(groups) {
        std::iota(all.begin(), all.end(), 0);
    }

    void run(int32_t ih) {
        load_kv(ih / (a.n_head / a.k.n_head_kv));
        std::fill(sums(ih, 0), sums(ih, a.n_sums), 0.0f);
        for (const auto & g : groups) {
            attend(ih, g);
        }
    }

  private:
    const attention &    a;
    const int32_t        d_k;
    const int32_t        d_v;
    const int32_t        n_blocks;  // registers that a value takes
    std::vector<int32_t> all;       // rows

    const std::vector<query_group> & groups;
    int32_t                          n_parts = N_PARTS;  // of the group in hand

    int32_t            ih_kv = -1;
    std::vector<float> k;       // [n_kv][d_k]
    std::vector<float> v;       // [n_blocks][n_kv][N_SIMD]
    std::vector<float> v_rows;  // of some cells

    std::vector<float> q;        // [N_PARTS][d_k][N_SIMD], scaled
    std::vector<float> weights;  // logits, then weights before they are divided by their sum  [n_kv][N_GROUP]
    std::vector<float> out;      // [n_blocks][N_GROUP][N_SIMD]

    float * sums(int32_t ih, int32_t row) const { return a.sums + ((size_t) ih * a.n_sums + row) * a.n_kv; }

    void load_kv(int32_t ih) {
        if (ih == ih_kv) {
            return;
        }
        ih_kv = ih;
        k.resize((size_t) a.n_kv * d_k);
        read_f32(a.k, all, ih, k.data());
        v.assign((size_t) n_blocks * a.n_kv * N_SIMD, 0.0f);
        v_rows.resize((size_t) N_GROUP * d_v);
        for (int32_t first = 0; first < a.n_kv; first += N_GROUP) {
            const int32_t n = std::min(N_GROUP, a.n_kv - first);
            read_f32(a.v, { all.begin() + first, all.begin() + first + n }, ih, v_rows.data());
            for (int32_t c = 0; c < n; ++c) {
                for (int32_t e = 0; e < d_v; ++e) {
                    v[((size_t) (e / N_SIMD) * a.n_kv + first + c) * N_SIMD + e % N_SIMD] = v_rows[(size_t) c * d_v + e];
                }
            }
        }
    }

    void load_q(int32_t ih, const query_group & g) {
        q.assign((size_t) N_PARTS * d_k * N_SIMD, 0.0f);
        for (int32_t i = 0; i < g.n; ++i) {
            const float * src = a.q + (g.first + i) * a.q_stride + ih * a.q_stride_head;
            float *       dst = q.data() + (size_t) (i / N_SIMD) * d_k * N_SIMD + i % N_SIMD;
            for (int32_t e = 0; e < d_k; ++e) {
                dst[(size_t) e * N_SIMD] = a.scale * src[e];
            }
        }
    }

    void attend(int32_t ih, const query_group & g) {
        n_parts = (g.n + N_SIMD - 1) / N_SIMD;
        load_q(ih, g);
        weights.resize((size_t) a.n_kv * N_GROUP);

        simd_f32 highest[N_PARTS];
        simd_f32 sum[N_PARTS] = {};
        std::fill(highest, highest + N_PARTS, splat(-INFINITY));

        for (const auto & [begin, end] : g.runs) {
            logits(begin, end);
            hide(begin, end, g.may_see, highest);
        }
        for (int32_t p = 0; p < n_parts; ++p) {
            highest[p] = highest[p] == -INFINITY ? simd_f32{} : highest[p];  // sees nothing
            if (a.sinks) {
                highest[p] = larger(highest[p], splat(a.sinks[ih]));
                sum[p]     = simd_exp(splat(a.sinks[ih]) - highest[p]);
            }
        }
        for (const auto & [begin, end] : g.runs) {
            for (int32_t c = begin; c < end; ++c) {
                for (int32_t p = 0; p < n_parts; ++p) {
                    float *        w = weights.data() + (size_t) c * N_GROUP + p * N_SIMD;
                    const simd_f32 x = simd_exp(load(w) - highest[p]);
                    sum[p] += x;
                    store(w, x);
                }
            }
        }
        float inverse[N_GROUP];
        for (int32_t p = 0; p < n_parts; ++p) {
            store(inverse + p * N_SIMD, sum[p] > 0.0f ? 1.0f / sum[p] : simd_f32{});
        }

        add_sums(ih, g, inverse);
        values(g);
        for (int32_t i = 0; i < g.n; ++i) {
            float * dst = a.out + ((size_t) (g.first + i) * a.n_head + ih) * d_v;
            for (int32_t e = 0; e < d_v; ++e) {
                dst[e] = inverse[i] * out[((size_t) (e / N_SIMD) * N_GROUP + i) * N_SIMD + e % N_SIMD];
            }
        }
    }

    // k of some cells times all queries of the group
    void logits(int32_t begin, int32_t end) {
        for (int32_t p = 0; p < n_parts; ++p) {
            const float * part = q.data() + (size_t) p * d_k * N_SIMD;
            for (int32_t c = begin; c < end; c += N_TILE) {
                const float * rows[N_TILE];
                for (int32_t t = 0; t < N_TILE; ++t) {
                    rows[t] = k.data() + (size_t) std::min(c + t, end - 1) * d_k;
                }
                simd_f32 acc[N_TILE] = {};
                for (int32_t e = 0; e < d_k; ++e) {
                    const simd_f32 y = load(part + (size_t) e * N_SIMD);
                    for (int32_t t = 0; t < N_TILE; ++t) {
                        acc[t] += rows[t][e] * y;
                    }
                }
                for (int32_t t = 0; t < std::min(N_TILE, end - c); ++t) {
                    store(weights.data() + (size_t) (c + t) * N_GROUP + p * N_SIMD, acc[t]);
                }
            }
        }
    }

    simd_f32 capped(simd_f32 x) const { return a.soft_cap > 0.0f ? a.soft_cap * simd_tanh(x / a.soft_cap) : x; }

    // soft cap, bias and mask
    void hide(int32_t begin, int32_t end, const std::vector<query_set> & may_see, simd_f32 * highest) {
        simd_i32 bit;
        for (int32_t l = 0; l < N_SIMD; ++l) {
            bit[l] = 1 << l;
        }
        for (int32_t c = begin; c < end; ++c) {
            const float more = a.bias ? a.bias[(size_t) ih_kv * a.bias_stride + c] : 0.0f;
            for (int32_t p = 0; p < n_parts; ++p) {
                float *        w    = weights.data() + (size_t) c * N_GROUP + p * N_SIMD;
                const simd_i32 open = ((int32_t) (may_see[c] >> (p * N_SIMD) & ((1u << N_SIMD) - 1)) & bit) != 0;
                const simd_f32 x    = open ? capped(load(w)) + more : splat(-INFINITY);
                highest[p]          = larger(highest[p], x);
                store(w, x);
            }
        }
    }

    void add_sums(int32_t ih, const query_group & g, const float * inverse) {
        for (int32_t row = 0; row < a.n_sums; ++row) {
            float own[N_GROUP] = {};
            bool  any          = false;
            for (int32_t i = 0; i < g.n; ++i) {
                own[i] = inverse[i] * a.weights[(size_t) (g.first + i) * a.n_sums + row];
                any |= own[i] != 0.0f;
            }
            float * dst = sums(ih, row);
            for (const auto & [begin, end] : g.runs) {
                for (int32_t c = begin; any && c < end; ++c) {
                    const float * w   = weights.data() + (size_t) c * N_GROUP;
                    simd_f32      acc = {};
                    for (int32_t p = 0; p < n_parts; ++p) {
                        acc += load(w + p * N_SIMD) * load(own + p * N_SIMD);
                    }
                    dst[c] += total(acc);
                }
            }
        }
    }

    // weights times v
    void values(const query_group & g) {
        out.assign((size_t) n_blocks * N_GROUP * N_SIMD, 0.0f);
        for (const auto & [begin, end] : g.runs) {
            for (int32_t b = 0; b < n_blocks; ++b) {
                const float * block = v.data() + (size_t) b * a.n_kv * N_SIMD;
                for (int32_t i = 0; i < g.n; i += N_TILE) {
                    float *  dst = out.data() + ((size_t) b * N_GROUP + i) * N_SIMD;
                    simd_f32 acc[N_TILE];
                    std::memcpy(acc, dst, sizeof(acc));
                    for (int32_t c = begin; c < end; ++c) {
                        const simd_f32 y = load(block + (size_t) c * N_SIMD);
                        const float *  w = weights.data() + (size_t) c * N_GROUP + i;
                        for (int32_t t = 0; t < N_TILE; ++t) {
                            acc[t] += w[t] * y;
                        }
                    }
                    std::memcpy(dst, acc, sizeof(acc));
                }
            }
        }
    }
};

}  // namespace

void attend(const attention & a, int32_t first, int32_t last) {
    if (first >= last) {
        return;
    }
    const auto groups = read_mask(a);
    if (groups.size() == 1) {
        const auto seen = cells_of(groups[0]);
        if (are_few(seen, groups[0])) {
            return attend_few(a, seen, first, last);
        }
    }
    head_attention head(a, groups);
    for (int32_t ih = first; ih < last; ++ih) {
        head.run(ih);
    }
}

}  // namespace elastic
