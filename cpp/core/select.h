#pragma once

#include "core/policy.h"

namespace elastic {

// how many image cells and text cells stay when n_keep of the cells may (select_rule::image_first)
//   all text stays while it leaves image cells at least half of their proportional share
//   (n_keep*n_image/(2*n_cells), rounded down); otherwise the image gets that share and text the rest
struct split {
    int32_t n_text  = 0;
    int32_t n_image = 0;
};
split split_budget(int32_t n_keep, int32_t n_text, int32_t n_image);

// image_first works on runs of neighbouring cells of one kind: the kind's number of cells is shared between its runs in
// proportion to their unprotected cells (rounded down, what is left over to the earlier runs), so that rank j is of the
// same kind in all layers and heads. Per layer and KV head the cells of highest score in a run stay.
//
// fills kept of the plan. Always kept: the first n_sink cells, the last cell, pinned cells. Ties go to the
// earlier cell. If the protected cells alone exceed n_keep, elastic::error says so.
void select_cells(select_rule rule, const plan_params & params, const cells & c, const head_map & score, plan & p);

}  // namespace elastic
