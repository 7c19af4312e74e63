#pragma once

// As many numbers as a register of this processor holds. For .cpp files of the core only: which it is depends on what
// they are compiled for, so it must not get into what others see.

#include <cstdint>
#include <cstring>

#ifndef __GNUC__
#error "GCC or Clang is needed, for their vector types"
#endif

namespace elastic {

namespace {

#ifdef __AVX512F__
constexpr int32_t N_LANES = 16;
#else
constexpr int32_t N_LANES = 8;
#endif

typedef float    lanes __attribute__((vector_size(N_LANES * 4)));
typedef int32_t  int_lanes __attribute__((vector_size(N_LANES * 4)));
typedef uint32_t uint_lanes __attribute__((vector_size(N_LANES * 4)));

inline lanes load(const float * x) {
    lanes res;
    std::memcpy(&res, x, sizeof(res));
    return res;
}

inline void store(float * dst, lanes x) {
    std::memcpy(dst, &x, sizeof(x));
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

inline float total(lanes x) {
    float values[N_LANES];
    store(values, x);
    return total(values);
}

}  // namespace

}  // namespace elastic
