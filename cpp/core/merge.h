#pragma once

#include "core/combiner.h"
#include "core/plan.h"
#include "kernels/kv_rows.h"

#include <limits>

namespace elastic {

// what a cell stands for, per layer and KV head, in logical order
struct cell_state {
    head_map importance;  // summed over what was merged in; never negative
    head_map count;       // tokens merged in, 1 for an ordinary cell
    head_map bias;        // added to the attention logits of later queries, 0 for an ordinary cell
};

// bias of a masked row: nothing attends to it, whatever lies there
constexpr float masked_bias = -std::numeric_limits<float>::infinity();

// Carries out one layer of the plan in place. rows_src[i]: stream row of logical cell i; rows_dst[j]: stream
// row that kept rank j moves to (no two the same).
// Reads a whole head before it writes one, so rows may move anywhere. Throws elastic::error on rows out of range.
// A masked rank gets masked_bias and no importance; its row is not touched.
// Rows that are only moved are copied bit by bit; merged rows are summed in f64 and re-quantized.
//   merging::mean:   K = sum(count_i K_i) / sum(count_i), V likewise
//   merging::biased: with the plan's weights w, the attention that is expected of a cell:
//                 V = sum(w_i V_i) / sum(w_i), bias += ln(sum(w_i) / w_anchor)
//                 (w_anchor == 0: plain mean and ln of the number of cells)
//                 K = K_anchor + key_weight * (mean of the group's K by the same weights - K_anchor). What a cell is given is
//                 exp(q K + bias), so without the bias its logarithm moves with the key:
//                 bias += key_weight * (ln(w_anchor) - bias_anchor - mean of the group's (ln(w_i) - bias_i))
// `out` must be sized [n_layer][n_head_kv][n_keep]; layer il of it is filled.
void merge_layer(const plan & p, const combiner & m, int32_t il, const kv_rows & k, const kv_rows & v,
                 const std::vector<int32_t> & rows_src, const std::vector<int32_t> & rows_dst, const cell_state & in, cell_state & out);

}  // namespace elastic
