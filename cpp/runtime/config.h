#pragma once

// elastic_params, checked.

#include "core/budget.h"
#include "core/policy.h"

#include <vector>

namespace elastic {

struct config {
    policy  pol;
    budget  keep;
    int32_t n_sink        = 1;
    int32_t offset        = 25;
    int32_t min_cells     = 64;
    int32_t n_threads     = 0;
    int32_t max_cells     = 0;
    int32_t delay         = 0;
    int32_t lookahead     = -1;
    int32_t overdraft     = -1;
    int32_t n_checkpoints = 2;
    bool    record        = false;

    std::vector<float> layer_share;

    bool release_memory = true;

    // cells beyond the budget that an answer may take before it is compressed
    int32_t n_overdraft() const { return overdraft >= 0 ? overdraft : pol.overdraft(); }

    // which scores are kept of every cell, see policy
    int32_t n_window() const { return record ? recorded_statistics().n_window : pol.n_window(); }
    float   decay() const { return record ? recorded_statistics().decay : pol.decay(); }
    bool    has_sum() const { return record || pol.needs_importance(); }
};

}  // namespace elastic
