#pragma once

// As many numbers as a register of this processor holds. For .cpp files of the kernels only: which it is depends on
// what they are compiled for, so it must not get into what others see.

#include <cstdint>
#include <cstring>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifndef __GNUC__
#error "GCC or Clang is needed, for their vector types"
#endif

namespace elastic {

namespace {

#ifdef __AVX512F__
constexpr int32_t N_SIMD = 16;
#else
constexpr int32_t N_SIMD = 8;
#endif

typedef float    simd_f32 __attribute__((vector_size(N_SIMD * 4)));
typedef int32_t  simd_i32 __attribute__((vector_size(N_SIMD * 4)));
typedef uint32_t simd_u32 __attribute__((vector_size(N_SIMD * 4)));

inline simd_f32 load(const float * x) {
    simd_f32 res;
    std::memcpy(&res, x, sizeof(res));
    return res;
}

inline void store(float * dst, simd_f32 x) {
    std::memcpy(dst, &x, sizeof(x));
}

inline simd_f32 splat(float x) {
    return x - simd_f32{};
}

inline simd_f32 larger(simd_f32 x, simd_f32 y) {
    return x > y ? x : y;
}

// of x <= 0, to a few units in the last place; 0 below e^-87 (range reduction and polynomial as in Cephes' expf)
inline simd_f32 simd_exp(simd_f32 x) {
    const simd_f32 shifted = x * 1.44269504f + 12582912.0f;  // the integer part stands in the lowest bits
    const simd_f32 n       = shifted - 12582912.0f;
    const simd_f32 r       = x - n * 0.693359375f + n * 2.12194440e-4f;
    simd_f32       p       = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p                      = p * r + 8.3334519073e-3f;
    p                      = p * r + 4.1665795894e-2f;
    p                      = p * r + 1.6666665459e-1f;
    p                      = p * r + 5.0000001201e-1f;
    p                      = p * r * r + r + 1.0f;
    const auto power       = ((simd_u32) shifted - 0x4b400000u + 127u) << 23;
    return x < -87.0f ? simd_f32{} : p * (simd_f32) power;
}

// to about 1e-7, absolute
inline simd_f32 simd_tanh(simd_f32 x) {
    const simd_f32 small = simd_exp(x < 0.0f ? x + x : -x - x);
    const simd_f32 y     = (1.0f - small) / (1.0f + small);
    return x < 0.0f ? -y : y;
}

inline float f16_to_f32(uint16_t half) {
    const uint32_t rest = (half & 0x7fffu) << 13;
    float          x;
    std::memcpy(&x, &rest, sizeof(x));
    x *= 0x1p112f;
    uint32_t res;
    std::memcpy(&res, &x, sizeof(res));
    res = (rest >= 0x0f800000 ? rest | 0x70000000 : res) | (half & 0x8000u) << 16;  // infinite, or no number
    std::memcpy(&x, &res, sizeof(x));
    return x;
}

inline simd_f32 load(const uint16_t * halves) {
#if defined(__AVX512F__)
    return (simd_f32) _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i *) halves));
#elif defined(__F16C__)
    return (simd_f32) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) halves));
#elif defined(__aarch64__)
    typedef __fp16 half_lanes __attribute__((vector_size(N_SIMD * 2)));
    half_lanes     x;
    std::memcpy(&x, halves, sizeof(x));
    return __builtin_convertvector(x, simd_f32);
#else
    typedef uint16_t half_lanes __attribute__((vector_size(N_SIMD * 2)));
    half_lanes       half;
    std::memcpy(&half, halves, sizeof(half));
    const simd_u32 bits = __builtin_convertvector(half, simd_u32);
    const simd_u32 rest = (bits & 0x7fffu) << 13;
    const simd_u32 res  = (simd_u32) ((simd_f32) rest * 0x1p112f);
    return (simd_f32) ((rest >= 0x0f800000u ? rest | 0x70000000u : res) | (bits & 0x8000u) << 16);
#endif
}

// of a power of two numbers, which are overwritten
template <int32_t N> float total(float (&values)[N]) {
    for (int32_t half = N / 2; half > 0; half /= 2) {
        for (int32_t l = 0; l < half; ++l) {
            values[l] += values[l + half];
        }
    }
    return values[0];
}

inline float total(simd_f32 x) {
    float values[N_SIMD];
    store(values, x);
    return total(values);
}

}  // namespace

}  // namespace elastic
