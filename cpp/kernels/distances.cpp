#include "kernels/distances.h"

#include "kernels/simd.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

// where the processor multiplies bytes: four products at once, added to each of N_SIMD sums
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
#include <immintrin.h>
#define HAS_BYTE_PRODUCTS
typedef __m512i byte_sums;

static byte_sums add_products(byte_sums sum, int32_t four, byte_sums anchors) {
    return _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(four), anchors);
}
#elif defined(__AVXVNNI__)
#include <immintrin.h>
#define HAS_BYTE_PRODUCTS
typedef __m256i byte_sums;

static byte_sums add_products(byte_sums sum, int32_t four, byte_sums anchors) {
    return _mm256_dpbusd_avx_epi32(sum, _mm256_set1_epi32(four), anchors);
}
#endif

namespace elastic {

#ifdef HAS_BYTE_PRODUCTS
static constexpr bool has_byte_products = true;
#else
static constexpr bool has_byte_products = false;
#endif

static constexpr int32_t N_SUMS = 32;  // sums side by side, so that the compiler can keep them in registers

template <typename F> static float sum_up(int32_t d, F term) {
    float sums[N_SUMS] = {};
    for (int32_t e = 0; e < d; e += N_SUMS) {
        for (int32_t l = 0; l < N_SUMS; ++l) {
            sums[l] += term(e + l);
        }
    }
    return total(sums);
}

static float squared(const float * x, int32_t d) {
    return sum_up(d, [&](int32_t e) { return x[e] * x[e]; });
}

// more than the rounding of a quick distance
static float slack(int32_t d) {
    return 1.0f - 2.0f * (float) d * FLT_EPSILON;
}

//
// points
//

void kv_points::fill(const std::vector<int32_t> & cells, const std::vector<float> & k, int32_t d_k, const std::vector<float> & v,
                     int32_t d_v) {
    n = (int32_t) cells.size();
    d = (d_k + d_v + N_SUMS - 1) / N_SUMS * N_SUMS;
    data.assign((size_t) n * d, 0.0f);
    norms.resize(n);
    put(cells, k, d_k, 0);
    put(cells, v, d_v, d_k);
    for (int32_t i = 0; i < n; ++i) {
        norms[i] = squared(row(i), d);
    }
    if (has_byte_products) {
        round_rows();
    } else {
        scales.assign(n, 1.0f);
        errors.assign(n, 0.0f);
    }
}

void kv_points::put(const std::vector<int32_t> & cells, const std::vector<float> & x, int32_t d_x, int32_t first) {
    std::vector<double> mean(d_x, 0.0);
    std::vector<double> sq(d_x, 0.0);
    for (const int32_t i : cells) {
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
            data[(size_t) i * d + first + e] = scale * (x[(size_t) cells[i] * d_x + e] - (float) mean[e]);
        }
    }
}

void kv_points::round_rows() {
    bytes.resize(data.size());
    scales.resize(n);
    errors.resize(n);
    for (int32_t i = 0; i < n; ++i) {
        const float * x           = row(i);
        uint8_t *     y           = bytes.data() + (size_t) i * d;
        float         top[N_SUMS] = {};
        for (int32_t e = 0; e < d; e += N_SUMS) {
            for (int32_t l = 0; l < N_SUMS; ++l) {
                top[l] = std::max(top[l], std::fabs(x[e + l]));
            }
        }
        const float highest = *std::max_element(top, top + N_SUMS);
        const float inverse = highest > 1e-30f ? 127.0f / highest : 0.0f;
        const float scale   = highest / 127.0f;
        for (int32_t e = 0; e < d; ++e) {
            y[e] = (uint8_t) (int32_t) (x[e] * inverse + 128.5f);
        }
        const float lost = sum_up(d, [&](int32_t e) {
            const float diff = x[e] - scale * (float) ((int32_t) y[e] - 128);
            return diff * diff;
        });
        scales[i]        = scale;
        errors[i]        = std::sqrt(lost) / slack(d);
    }
}

float kv_points::distance(int32_t i, int32_t j) const {
    const float * x = row(i);
    const float * y = row(j);
    return sum_up(d, [&](int32_t e) {
        const float diff = x[e] - y[e];
        return diff * diff;
    });
}

//
// anchors
//

void anchor_block::set(const kv_points & points, const int32_t * anchors, int32_t n) {
    std::fill(norms, norms + N_ANCHORS, FLT_MAX);
    std::fill(lengths, lengths + N_ANCHORS, 0.0f);
    std::fill(scales, scales + N_ANCHORS, 0.0f);
    std::fill(errors, errors + N_ANCHORS, 0.0f);
    std::fill(offsets, offsets + N_ANCHORS, 0.0f);
    data.resize((size_t) points.d * N_ANCHORS, 0.0f);
    bytes.resize((size_t) points.d * N_ANCHORS, 0);

    for (int32_t r = 0; r < n; ++r) {
        const int32_t i = anchors[r];
        norms[r]        = points.norms[i];
        lengths[r]      = std::sqrt(norms[r]);
        scales[r]       = points.scales[i];
        errors[r]       = points.errors[i];
        if (!has_byte_products) {
            for (int32_t e = 0; e < points.d; ++e) {
                data[(size_t) e * N_ANCHORS + r] = points.row(i)[e];
            }
            continue;
        }
        const uint8_t * x   = points.bytes.data() + (size_t) i * points.d;
        int32_t         sum = 0;
        for (int32_t e = 0; e < points.d; ++e) {
            const int32_t byte                                  = (int32_t) x[e] - 128;
            bytes[(size_t) (e / 4 * N_ANCHORS + r) * 4 + e % 4] = (int8_t) byte;
            sum += byte;
        }
        offsets[r] = 128.0f * (float) sum;
    }
}

// mostly none is: without branches that is told by a few instructions
static bool any_below(const float * x, float than) {
    int32_t below[N_ANCHORS];
    for (int32_t r = 0; r < N_ANCHORS; ++r) {
        below[r] = x[r] < than ? -1 : 0;
    }
    uint64_t pairs[N_ANCHORS / 2];
    std::memcpy(pairs, below, sizeof(pairs));
    uint64_t res = 0;
    for (const uint64_t pair : pairs) {
        res |= pair;
    }
    return res != 0;
}

// products of N_CELLS cells with N_SIMD of the anchors that lie side by side
#ifdef HAS_BYTE_PRODUCTS
static void multiply(const uint8_t * const * cells, const int8_t * anchors, int32_t d, simd_f32 * dst) {
    byte_sums sums[N_CELLS] = {};
    for (int32_t e = 0; e < d; e += 4) {
        byte_sums y;
        std::memcpy(&y, anchors + (size_t) e * N_ANCHORS, sizeof(y));
        for (int32_t q = 0; q < N_CELLS; ++q) {
            int32_t four;
            std::memcpy(&four, cells[q] + e, sizeof(four));
            sums[q] = add_products(sums[q], four, y);
        }
    }
    for (int32_t q = 0; q < N_CELLS; ++q) {
        dst[q] = __builtin_convertvector((simd_i32) sums[q], simd_f32);
    }
}
#else
static void multiply(const float * const * cells, const float * anchors, int32_t d, simd_f32 * dst) {
    std::fill(dst, dst + N_CELLS, simd_f32{});
    for (int32_t e = 0; e < d; ++e) {
        const simd_f32 y = load(anchors + (size_t) e * N_ANCHORS);
        for (int32_t q = 0; q < N_CELLS; ++q) {
            dst[q] += cells[q][e] * y;
        }
    }
}
#endif

// |x - y|^2 = |x|^2 + |y|^2 - 2xy, and of rounded x and y the product is off by at most |x||dy| + |dx||y| + |dx||dy|
void anchor_block::bound(const kv_points & points, const int32_t * cells, int32_t n_cells, const float * than, float (*dst)[N_ANCHORS],
                         bool * any) const {
#ifdef HAS_BYTE_PRODUCTS
    const auto * of_cells   = points.bytes.data();
    const auto * of_anchors = bytes.data();
    const int    n_together = 4;
#else
    const auto * of_cells   = points.data.data();
    const auto * of_anchors = data.data();
    const int    n_together = 1;
#endif
    decltype(of_cells) x[N_CELLS];
    for (int32_t q = 0; q < N_CELLS; ++q) {
        x[q] = of_cells + (size_t) cells[std::min(q, n_cells - 1)] * points.d;
    }
    for (int32_t first = 0; first < N_ANCHORS; first += N_SIMD) {
        simd_f32 products[N_CELLS];
        multiply(x, of_anchors + first * n_together, points.d, products);

        const simd_f32 all_norms   = load(norms + first);
        const simd_f32 all_lengths = load(lengths + first);
        const simd_f32 all_scales  = load(scales + first);
        const simd_f32 all_errors  = load(errors + first);
        const simd_f32 all_offsets = load(offsets + first);
        for (int32_t q = 0; q < n_cells; ++q) {
            const int32_t i      = cells[q];
            const float   length = std::sqrt(points.norms[i]) + points.errors[i];

            const simd_f32 product = points.scales[i] * all_scales * (products[q] - all_offsets);
            const simd_f32 off     = points.errors[i] * all_lengths + length * all_errors;
            store(dst[q] + first, slack(points.d) * (points.norms[i] + all_norms) - 2.0f * (product + off));
        }
    }
    for (int32_t q = 0; q < n_cells; ++q) {
        any[q] = any_below(dst[q], than[q]);
    }
}

}  // namespace elastic
