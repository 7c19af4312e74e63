#pragma once

#include "core/layout.h"
#include "core/plan.h"

namespace elastic {

// For each cell that is not kept the nearest kept one that it may join, logical indices, -1: none  [n_layer][n_head_kv][n_cells].
// Empty: not looked for.
typedef std::vector<int32_t> neighbours;

// Fills kept of the plan, whose sizes are set. Returns neighbours where the selector found them on the way.
neighbours select_cells(const selector & s, const layout & l, const head_map & score, const row_source * rows, plan & p, int32_t n_threads);

// Fills rank_score: infinite for a rank that holds a protected cell in any head, or
// text of a run that was kept whole, which is never evicted by its score.
void sum_rank_scores(const layout & l, const head_map & score, plan & p);

}  // namespace elastic
