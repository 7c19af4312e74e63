#pragma once

#include "core/policy.h"

namespace elastic {

// dst[i] += src[i] / n_parts where used[i] is 1, not 0  [n]
void add_share(float * dst, const float * src, const float * used, int32_t n, int32_t n_parts);

// score of every cell per layer and KV head, higher = keep  [n_layer][n_head_kv][n_cells]
//   window:  mean of `recent` over the pool_size cells around each (fewer at the ends)
//   by_kind: sum / (sum over the head's cells) + the recent score, averaged over the kind_pool_size cells around, likewise:
//            for text over all cells (what the first cells draw spills over, so the words that a prompt begins with stay), and half of
//            it comes from the cells before, text_follow per cell (an answer that quotes a word goes on to the next),
//            for image cells over image cells (text counts as 0) and asked_ahead times if the cells end with an image,
//            for a question that is still to come will look where the words around the image do, not where patches do
head_map score_cells(score_rule rule, const cells & c, const importance_map & importance);

}  // namespace elastic
