#pragma once

#include "core/statistics.h"
#include "kernels/distances.h"

namespace elastic {

// keys and values of one layer and head, read once for all runs
struct head_rows {
    int32_t            d_k = 0;
    int32_t            d_v = 0;
    std::vector<float> k;      // [n_cells][d_k]
    std::vector<float> v;      // [n_cells][d_v]
    kv_points          space;  // of the run in hand; its memory is kept from run to run

    void load(const row_source & rows, int32_t il, int32_t ih, int32_t n_cells);
};

}  // namespace elastic
