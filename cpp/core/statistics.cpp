#include "core/statistics.h"

#include <algorithm>

namespace elastic {

statistics operator|(const statistics & a, const statistics & b) {
    const bool agree = a.n_window == b.n_window && a.decay == b.decay;
    if (a.recent() && b.recent() && !agree) {
        throw error("[policy] its parts want recent attention in different forms, and only one can be kept");
    }
    return { a.sum || b.sum, std::max(a.n_window, b.n_window), std::max(a.decay, b.decay), a.rows || b.rows };
}

void add_share(float * dst, const float * src, const float * used, int32_t n, int32_t n_parts) {
    for (int32_t i = 0; i < n; ++i) {
        dst[i] += used[i] != 0.0f ? src[i] / (float) n_parts : 0.0f;
    }
}

}  // namespace elastic
