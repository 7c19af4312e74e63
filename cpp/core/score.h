#pragma once

#include "core/policy.h"

namespace elastic {

// score of every cell per layer and KV head, higher = keep  [n_layer][n_head_kv][n_cells]
//   window:  mean of `recent` over the pool_size cells around each (fewer at the ends)
//   by_kind: sum / (sum over the head's cells) + the same of the pooled recent score, which for image cells counts
//            image_recent times: their patches look at each other, and frequency is right there. In full instead if
//            the cells end with an image, for a question that is still to come will look elsewhere
head_map score_cells(score_rule rule, const cells & c, const importance_map & importance);

}  // namespace elastic
