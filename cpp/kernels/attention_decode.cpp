#include "kernels/attention_decode.h"

#include "kernels/kv_rows.h"
#include "kernels/simd.h"

#include <algorithm>
#include <cmath>

namespace elastic {

namespace {

constexpr int32_t N_TILE = 8;  // rows that are read together, all heads of them: they lie side by side

// of 8 numbers each
typedef float   eight __attribute__((vector_size(32)));
typedef int32_t int_eight __attribute__((vector_size(32)));

template <int... I> eight shuffle(eight x, eight y) {
#ifdef __clang__
    return __builtin_shufflevector(x, y, I...);
#else
    return __builtin_shuffle(x, y, int_eight{ I... });
#endif
}

eight fold(simd_f32 x) {
    eight parts[N_SIMD / 8];
    std::memcpy(parts, &x, sizeof(parts));
    return N_SIMD == 8 ? parts[0] : parts[0] + parts[N_SIMD / 8 - 1];
}

// the total of each of 8
eight totals(const simd_f32 (&x)[8]) {
    eight pairs[4];
    for (int32_t i = 0; i < 4; ++i) {
        const eight a = fold(x[2 * i]), b = fold(x[2 * i + 1]);
        pairs[i] = shuffle<0, 8, 2, 10, 4, 12, 6, 14>(a, b) + shuffle<1, 9, 3, 11, 5, 13, 7, 15>(a, b);
    }
    eight fours[2];
    for (int32_t i = 0; i < 2; ++i) {
        const eight a = pairs[2 * i], b = pairs[2 * i + 1];
        fours[i] = shuffle<0, 1, 8, 9, 4, 5, 12, 13>(a, b) + shuffle<2, 3, 10, 11, 6, 7, 14, 15>(a, b);
    }
    return shuffle<0, 1, 2, 3, 8, 9, 10, 11>(fours[0], fours[1]) + shuffle<4, 5, 6, 7, 12, 13, 14, 15>(fours[0], fours[1]);
}

float number(float x) {
    return x;
}

float number(uint16_t half) {
    return f16_to_f32(half);
}

// dst[j] = x times row j, of N_TILE rows
template <typename T> void dots(float * dst, const float * x, const T * const * rows, int32_t n) {
    simd_f32 acc[N_TILE] = {};
    int32_t  e           = 0;
    for (; e + N_SIMD <= n; e += N_SIMD) {
        const simd_f32 y = load(x + e);
        for (int32_t j = 0; j < N_TILE; ++j) {
            acc[j] += y * load(rows[j] + e);
        }
    }
    const eight res = totals(acc);
    std::memcpy(dst, &res, sizeof(res));
    for (; e < n; ++e) {
        for (int32_t j = 0; j < N_TILE; ++j) {
            dst[j] += x[e] * number(rows[j][e]);
        }
    }
}

// dst[e] += sum of w[j] * rows[j][e] over N_TILE rows
template <typename T> void add_rows(float * dst, const float * w, const T * const * rows, int32_t n) {
    int32_t e = 0;
    for (; e + N_SIMD <= n; e += N_SIMD) {
        simd_f32 acc[2] = { load(dst + e) };
        for (int32_t j = 0; j < N_TILE; ++j) {
            acc[j % 2] += w[j] * load(rows[j] + e);
        }
        store(dst + e, acc[0] + acc[1]);
    }
    for (; e < n; ++e) {
        for (int32_t j = 0; j < N_TILE; ++j) {
            dst[e] += w[j] * number(rows[j][e]);
        }
    }
}

// the heads [first, last)
class heads_attention {
  public:
    heads_attention(const attention & a, int32_t first, int32_t last)
        : a(a), n_gqa(a.n_head / a.k.n_head_kv), first(first), last(last), q((size_t) n() * a.k.n_embd_head), inverse(n()) {
        std::fill(sums(first, 0), sums(last, 0), 0.0f);
    }

    void run(int32_t i, const std::vector<int32_t> & cells) {
        stride = ((int32_t) cells.size() + N_SIMD - 1) / N_SIMD * N_SIMD;  // of whole tiles too
        weights.resize((size_t) n() * stride);
        logits(i, cells);
        for (int32_t h = 0; h < n(); ++h) {
            inverse[h] = exponentials(row(h), a.sinks ? a.sinks + first + h : nullptr);
            add_sums(i, h, cells);
        }
        std::fill(out(i, 0), out(i, n()), 0.0f);
        values(i, cells);
        for (int32_t h = 0; h < n(); ++h) {
            std::transform(out(i, h), out(i, h + 1), out(i, h), [&](float x) { return x * inverse[h]; });
        }
    }

  private:
    const attention & a;
    const int32_t     n_gqa;
    const int32_t     first;
    const int32_t     last;

    std::vector<float> q;  // scaled  [n][d_k]
    int32_t            stride = 0;
    std::vector<float> weights;  // logits, then weights before they are divided by their sum  [n][stride]
    std::vector<float> inverse;  // of that sum  [n]
    std::vector<float> tile;

    int32_t n() const { return last - first; }
    float * row(int32_t h) { return weights.data() + (size_t) h * stride; }
    float * out(int32_t i, int32_t h) const { return a.out + ((size_t) i * a.n_head + first + h) * a.v.n_embd_head; }
    float * sums(int32_t ih, int32_t row) const { return a.sums + ((size_t) ih * a.n_sums + row) * a.n_kv; }

    // heads [begin, end) that share a KV head, one group after the other, as f(begin, end, KV head)
    template <typename F> void each_kv_head(F f) const {
        for (int32_t begin = 0, end = 0; begin < n(); begin = end) {
            const int32_t ih_kv = (first + begin) / n_gqa;
            end                 = std::min(n(), (ih_kv + 1) * n_gqa - first);
            f(begin, end, ih_kv);
        }
    }

    // N_TILE cells, head by head as f(begin, end, first cell, rows); behind the last cell it comes again
    template <typename F> void each_tile(const kv_rows & t, const std::vector<int32_t> & cells, F f) {
        const size_t n_bytes = head_bytes(t);
        const auto   row     = [&](size_t c) {
            return t.data + cells[std::min(c, cells.size() - 1)] * t.row_bytes;
        };
        for (size_t c = 0; c < cells.size(); c += N_TILE) {
            each_kv_head([&](int32_t begin, int32_t end, int32_t ih_kv) {
                for (int32_t j = 0; j < N_TILE; ++j) {
                    prefetch(row(c + N_TILE + j) + ih_kv * n_bytes, n_bytes);
                }
                as_numbers(
                    t.type, t.n_embd_head, [&](int32_t j) { return row(c + j) + ih_kv * n_bytes; },
                    [&](const auto & rows) { f(begin, end, c, rows); });
            });
        }
    }

    // N_TILE times n numbers that begin at src(j), as f(pointers): halves as they are, others as f32
    template <typename S, typename F> void as_numbers(ggml_type type, int32_t n, S src, F f) {
        const uint16_t * halves[N_TILE];
        const float *    floats[N_TILE];
        tile.resize((size_t) N_TILE * n);
        for (int32_t j = 0; j < N_TILE; ++j) {
            float * dst = tile.data() + (size_t) j * n;
            halves[j]   = (const uint16_t *) src(j);
            floats[j]   = dst;
            if (type != GGML_TYPE_F16) {
                to_f32(type, src(j), dst, n);
            }
        }
        type == GGML_TYPE_F16 ? f(halves) : f(floats);
    }

    void logits(int32_t i, const std::vector<int32_t> & cells) {
        const int32_t d = a.k.n_embd_head;
        for (int32_t h = 0; h < n(); ++h) {
            const float * src = a.q + i * a.q_stride + (first + h) * a.q_stride_head;
            std::transform(src, src + d, q.data() + (size_t) h * d, [&](float x) { return x * a.scale; });
        }
        each_tile(a.k, cells, [&](int32_t begin, int32_t end, size_t c, const auto & rows) {
            for (int32_t h = begin; h < end; ++h) {
                dots(row(h) + c, q.data() + (size_t) h * d, rows, d);
            }
        });
        for (int32_t h = 0; h < n(); ++h) {
            for (int32_t c = 0; a.soft_cap > 0.0f && c < stride; c += N_SIMD) {
                store(row(h) + c, a.soft_cap * simd_tanh(load(row(h) + c) / a.soft_cap));
            }
            std::fill(row(h) + cells.size(), row(h) + stride, -INFINITY);
        }
        for (int32_t h = 0; a.bias && h < n(); ++h) {
            const float * bias = a.bias + (first + h) / n_gqa * a.bias_stride;
            for (size_t c = 0; c < cells.size(); ++c) {
                row(h)[c] += bias[cells[c]];
            }
        }
    }

    // in place; returns 1 over their sum, with the sink's if there is one
    float exponentials(float * w, const float * sink) const {
        simd_f32 highest = splat(-INFINITY);
        for (int32_t c = 0; c < stride; c += N_SIMD) {
            highest = larger(highest, load(w + c));
        }
        float top = -INFINITY;
        for (int32_t l = 0; l < N_SIMD; ++l) {
            top = std::max(top, highest[l]);
        }
        top          = sink ? std::max(top, *sink) : top;
        simd_f32 sum = {};
        for (int32_t c = 0; c < stride; c += N_SIMD) {
            const simd_f32 x = simd_exp(load(w + c) - top);
            sum += x;
            store(w + c, x);
        }
        return stride > 0 ? 1.0f / (total(sum) + (sink ? std::exp(*sink - top) : 0.0f)) : 0.0f;
    }

    void add_sums(int32_t i, int32_t h, const std::vector<int32_t> & cells) {
        for (int32_t r = 0; r < a.n_sums; ++r) {
            const float factor = inverse[h] * a.weights[(size_t) i * a.n_sums + r];
            float *     dst    = sums(first + h, r);
            for (size_t c = 0; factor != 0.0f && c < cells.size(); ++c) {
                dst[cells[c]] += factor * row(h)[c];
            }
        }
    }

    void values(int32_t i, const std::vector<int32_t> & cells) {
        each_tile(a.v, cells, [&](int32_t begin, int32_t end, size_t c, const auto & rows) {
            for (int32_t h = begin; h < end; ++h) {
                add_rows(out(i, h), row(h) + c, rows, a.v.n_embd_head);
            }
        });
    }
};

}  // namespace

void attend_few(const attention & a, const seen_cells & seen, int32_t first, int32_t last) {
    heads_attention heads(a, first, last);
    for (int32_t i = 0; i < a.n_q; ++i) {
        heads.run(i, seen[i]);
    }
}

}  // namespace elastic
