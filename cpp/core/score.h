#pragma once

#include "core/policy.h"

namespace elastic {

// score of every cell per layer and KV head, higher = keep  [n_layer][n_head_kv][n_cells]
//   window:  mean of `recent` over the pool_size cells around each (fewer at the ends)
//   by_kind: image cells: sum. Others: sum / (sum over the head's cells) + the same of the pooled recent score;
//            image cells too if the cells end with an image: its patches look at each other, a question will not
head_map score_cells(score_rule rule, const cells & c, const importance_map & importance);

}  // namespace elastic
