#include "core/similarity.h"

#include <algorithm>
#include <cmath>

namespace elastic {

// A matrix product without the matrix: keys are laid out so that a block of them fills the vector registers,
// each query element is multiplied with a whole block, and only the best of each block is looked at.
static constexpr int32_t N_BLOCK = 32;  // keys per block
static constexpr int32_t N_QUERY = 4;   // queries per pass

void most_similar(const float * queries, int32_t n_queries, const float * keys, int32_t n_keys, int32_t d, int32_t * best) {
    const int32_t n_blocks = (n_keys + N_BLOCK - 1) / N_BLOCK;

    std::vector<float> packed((size_t) n_blocks * d * N_BLOCK, 0.0f);  // [n_blocks][d][N_BLOCK]
    for (int32_t k = 0; k < n_keys; ++k) {
        float * block = packed.data() + (size_t) (k / N_BLOCK) * d * N_BLOCK + k % N_BLOCK;
        for (int32_t e = 0; e < d; ++e) {
            block[(size_t) e * N_BLOCK] = keys[(size_t) k * d + e];
        }
    }

    for (int32_t q0 = 0; q0 < n_queries; q0 += N_QUERY) {
        const int32_t n = std::min(N_QUERY, n_queries - q0);

        float best_dot[N_QUERY];
        std::fill(best_dot, best_dot + N_QUERY, -HUGE_VALF);
        std::fill(best + q0, best + q0 + n, 0);

        const float * q[N_QUERY];
        for (int32_t i = 0; i < N_QUERY; ++i) {
            q[i] = queries + (size_t) (q0 + std::min(i, n - 1)) * d;
        }

        for (int32_t b = 0; b < n_blocks; ++b) {
            const float * block                 = packed.data() + (size_t) b * d * N_BLOCK;
            float         dot[N_QUERY][N_BLOCK] = {};
            for (int32_t e = 0; e < d; ++e) {
                const float * k = block + (size_t) e * N_BLOCK;
                for (int32_t i = 0; i < N_QUERY; ++i) {
                    const float x = q[i][e];
                    for (int32_t j = 0; j < N_BLOCK; ++j) {
                        dot[i][j] += x * k[j];
                    }
                }
            }
            const int32_t n_in_block = std::min(N_BLOCK, n_keys - b * N_BLOCK);
            for (int32_t i = 0; i < n; ++i) {
                for (int32_t j = 0; j < n_in_block; ++j) {
                    if (dot[i][j] > best_dot[i]) {
                        best_dot[i]  = dot[i][j];
                        best[q0 + i] = b * N_BLOCK + j;
                    }
                }
            }
        }
    }
}

}  // namespace elastic
