#pragma once

#include <cstdint>
#include <vector>

namespace elastic {

struct plan_params {
    int32_t n_keep = 0;  // cells to keep, 1 <= n_keep <= n_cells
    int32_t n_sink = 1;  // first cells that always stay (clamped, see select.h)

    // cells of each layer in relation to the others', n_keep on average; empty: what the policy's layer budget says  [n_layer]
    std::vector<float> layer_share;

    int32_t n_rank_max = 0;  // and the most that a layer keeps, at least n_keep; 0: no limit
};

}  // namespace elastic
