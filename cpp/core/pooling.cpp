#include "core/pooling.h"

#include <algorithm>
#include <numeric>

namespace elastic {

std::vector<float> pooled(const float * x, int32_t n, int32_t n_near) {
    const int32_t      half = n_near / 2;
    std::vector<float> res(n);
    for (int32_t i = 0; i < n; ++i) {
        const int32_t lo  = std::max(0, i - half);
        const int32_t hi  = std::min(n, i + half + 1);
        double        sum = 0.0;
        for (int32_t j = lo; j < hi; ++j) {
            sum += x[j];
        }
        res[i] = (float) (sum / (hi - lo));
    }
    return res;
}

double total_of(const float * x, int32_t n) {
    return std::accumulate(x, x + n, 0.0);
}

}  // namespace elastic
