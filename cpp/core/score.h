#pragma once

#include "core/policy.h"

namespace elastic {

// score of every cell per layer and KV head, higher = keep  [n_layer][n_head_kv][n_cells]
head_map score_cells(score_rule rule, const head_map & importance);

}  // namespace elastic
