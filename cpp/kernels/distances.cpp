#include "kernels/distances.h"

#include "kernels/simd.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

namespace elastic {

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

// bytes are multiplied four times as fast as floats are (AVX-512 VNNI)
#ifdef __AVX512VNNI__
static constexpr bool BY_BYTES = true;
#else
static constexpr bool BY_BYTES = false;
#endif

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
    bytes.resize(BY_BYTES ? data.size() : 0);
    rounded.resize(BY_BYTES ? n : 0);
    for (int32_t i = 0; i < n; ++i) {
        norms[i] = squared(row(i), d);
        if (BY_BYTES) {
            round(i);
        }
    }
}

bool kv_points::by_bytes() {
    return BY_BYTES;
}

void kv_points::round(int32_t i) {
    const float * x               = row(i);
    int8_t *      dst             = bytes.data() + (size_t) i * d;
    float         largest[N_SUMS] = {};
    for (int32_t e = 0; e < d; e += N_SUMS) {
        for (int32_t l = 0; l < N_SUMS; ++l) {
            const float size = x[e + l] < 0.0f ? -x[e + l] : x[e + l];
            largest[l]       = size > largest[l] ? size : largest[l];
        }
    }
    const float most    = *std::max_element(largest, largest + N_SUMS);
    const float scale   = most > 0.0f ? most / 127.0f : 1.0f;
    const float inverse = 1.0f / scale;
    int32_t     sum     = 0;
    for (int32_t e = 0; e < d; ++e) {
        const int32_t byte = (int32_t) (x[e] * inverse + 128.5f) - 128;

        dst[e] = (int8_t) byte;
        sum += byte;
    }
    const float size = sum_up(d, [&](int32_t e) { return (float) dst[e] * (float) dst[e]; });
    const float lost = sum_up(d, [&](int32_t e) {
        const float diff = x[e] - scale * (float) dst[e];
        return diff * diff;
    });
    rounded[i]       = { scale, sum, 1.001f * scale * std::sqrt(size), 1.001f * std::sqrt(lost) };
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
    for (int32_t r = 0; r < n; ++r) {
        norms[r] = points.norms[anchors[r]];
    }
    if (BY_BYTES) {
        return set_bytes(points, anchors, n);
    }
    data.resize((size_t) points.d * N_ANCHORS, 0.0f);
    for (int32_t r = 0; r < n; ++r) {
        const int32_t i = anchors[r];
        for (int32_t e = 0; e < points.d; ++e) {
            data[(size_t) e * N_ANCHORS + r] = points.row(i)[e];
        }
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
static void multiply(const float * const * cells, const float * anchors, int32_t d, simd_f32 * dst) {
    std::fill(dst, dst + N_CELLS, simd_f32{});
    for (int32_t e = 0; e < d; ++e) {
        const simd_f32 y = load(anchors + (size_t) e * N_ANCHORS);
        for (int32_t q = 0; q < N_CELLS; ++q) {
            dst[q] += cells[q][e] * y;
        }
    }
}

#ifdef __AVX512VNNI__

void anchor_block::set_bytes(const kv_points & points, const int32_t * anchors, int32_t n) {
    bytes.resize((size_t) points.d * N_ANCHORS, 0);
    for (int32_t r = 0; r < n; ++r) {
        const int8_t * x = points.bytes.data() + (size_t) anchors[r] * points.d;

        rounded[r] = points.rounded[anchors[r]];
        for (int32_t e = 0; e < points.d; e += 4) {
            uint32_t four;
            std::memcpy(&four, x + e, sizeof(four));
            four ^= 0x80808080u;  // 128 more
            std::memcpy(bytes.data() + (size_t) e * N_ANCHORS + 4 * r, &four, sizeof(four));
        }
    }
}

// as multiply(), of bytes
static void multiply_bytes(const int8_t * const * cells, const uint8_t * anchors, int32_t d, simd_i32 * dst) {
    __m512i sums[N_CELLS];
    std::fill(sums, sums + N_CELLS, _mm512_setzero_si512());
    for (int32_t e = 0; e < d; e += 4) {
        const __m512i y = _mm512_loadu_si512(anchors + (size_t) e * N_ANCHORS);
        for (int32_t q = 0; q < N_CELLS; ++q) {
            int32_t x;
            std::memcpy(&x, cells[q] + e, sizeof(x));
            sums[q] = _mm512_dpbusd_epi32(sums[q], y, _mm512_set1_epi32(x));
        }
    }
    for (int32_t q = 0; q < N_CELLS; ++q) {
        dst[q] = (simd_i32) sums[q];
    }
}

// A product of two points is that of their bytes, and no more beside it than the lengths of what is lost allow.
void anchor_block::bound_bytes(const kv_points & points, const int32_t * cells, int32_t n_cells, float (*dst)[N_ANCHORS]) const {
    const int8_t * x[N_CELLS];
    for (int32_t q = 0; q < N_CELLS; ++q) {
        x[q] = points.bytes.data() + (size_t) cells[std::min(q, n_cells - 1)] * points.d;
    }
    simd_i32 products[N_CELLS];
    multiply_bytes(x, bytes.data(), points.d, products);
    float scales[N_ANCHORS], sizes[N_ANCHORS], lost[N_ANCHORS];
    for (int32_t r = 0; r < N_ANCHORS; ++r) {
        scales[r] = rounded[r].scale;
        sizes[r]  = rounded[r].size;
        lost[r]   = rounded[r].lost;
    }
    for (int32_t q = 0; q < n_cells; ++q) {
        const auto &   own     = points.rounded[cells[q]];
        const float    length  = std::sqrt(points.norms[cells[q]]);
        const simd_f32 product = own.scale * load(scales) * __builtin_convertvector(products[q] - 128 * own.sum, simd_f32);
        const simd_f32 beside  = own.lost * load(sizes) + length * load(lost);
        store(dst[q], slack(points.d) * (points.norms[cells[q]] + load(norms)) - 2.0f * (product + 1.001f * beside));
    }
}

#else

void anchor_block::set_bytes(const kv_points &, const int32_t *, int32_t) {}

void anchor_block::bound_bytes(const kv_points &, const int32_t *, int32_t, float (*)[N_ANCHORS]) const {}

#endif

// |x - y|^2 = |x|^2 + |y|^2 - 2xy
void anchor_block::bound(const kv_points & points, const int32_t * cells, int32_t n_cells, const float * than, float (*dst)[N_ANCHORS],
                         bool * any) const {
    if (BY_BYTES) {
        bound_bytes(points, cells, n_cells, dst);
    } else {
        bound_floats(points, cells, n_cells, dst);
    }
    for (int32_t q = 0; q < n_cells; ++q) {
        any[q] = any_below(dst[q], than[q]);
    }
}

void anchor_block::bound_floats(const kv_points & points, const int32_t * cells, int32_t n_cells, float (*dst)[N_ANCHORS]) const {
    const float * x[N_CELLS];
    for (int32_t q = 0; q < N_CELLS; ++q) {
        x[q] = points.row(cells[std::min(q, n_cells - 1)]);
    }
    for (int32_t first = 0; first < N_ANCHORS; first += N_SIMD) {
        simd_f32 products[N_CELLS];
        multiply(x, data.data() + first, points.d, products);
        for (int32_t q = 0; q < n_cells; ++q) {
            store(dst[q] + first, slack(points.d) * (points.norms[cells[q]] + load(norms + first)) - 2.0f * products[q]);
        }
    }
}

}  // namespace elastic
