#pragma once

// elastic_params, checked.

#include "core/budget.h"
#include "core/policy.h"
#include "runtime/elastic.h"

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
    int32_t overdraft     = -1;
    int32_t n_checkpoints = 2;
    int32_t n_question    = 0;
    bool    record        = false;

    std::vector<float> layer_share;

    bool release_memory = true;

    // cells beyond the budget that an answer may take before it is compressed
    int32_t n_overdraft() const { return overdraft >= 0 ? overdraft : pol.overdraft(); }

    bool keeps_all() const { return pol.keeps_all() || (keep.n_cells == 0 && keep.fraction >= 1.0 && max_cells == 0); }
    // layers may keep different numbers of cells, and their memory follows where it can
    bool may_vary_layers() const { return pol.can_vary_layers() && max_cells == 0 && release_memory && !keeps_all(); }

    // which scores are kept of every cell, see policy
    int32_t n_window() const { return record ? recorded_statistics().n_window : pol.n_window(); }
    float   decay() const { return record ? recorded_statistics().decay : pol.decay(); }
    bool    has_sum() const { return record || pol.needs_importance(); }
};

config make_config(const elastic_params & params);         // throws elastic::error
void   check_layers(const config & cfg, int32_t n_layer);  // throws elastic::error for shares that are not > 0, or of another number

}  // namespace elastic
