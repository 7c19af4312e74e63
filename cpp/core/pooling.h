#pragma once

#include <cstdint>
#include <vector>

namespace elastic {

// mean over the n_near cells around each, fewer at the ends
std::vector<float> pooled(const float * x, int32_t n, int32_t n_near);

// sum in f64
double total_of(const float * x, int32_t n);

}  // namespace elastic
