#pragma once

#include "core/types.h"

namespace elastic {

// What happens to every cell of a sequence, per layer and KV head. Made by a pure function
// (policy.h), checked by validate(), carried out by merge.h, which alone changes anything.
struct plan {
    int32_t n_layer   = 0;
    int32_t n_head_kv = 0;
    int32_t n_cells   = 0;  // before
    int32_t n_keep    = 0;  // after: ranks, the same for all layers and heads

    // logical indices of the kept cells in rank order, which need not ascend; -1 in all heads of a layer where the rank
    // is masked  [n_layer][n_head_kv][n_keep]
    std::vector<int32_t> kept;

    // for merge.h: the attention that is expected of each cell  [n_layer][n_head_kv][n_cells], and the share of the way to its
    // group's mean that the key of an anchor goes  [n_cells]
    head_map           weight;
    std::vector<float> key_weight;

    // score of a rank summed over layers and heads, infinite where a protected cell holds it  [n_keep]
    std::vector<float>   rank_score;
    // for each cell: the rank in `kept` of the anchor it joins (its own rank when it is kept), -1: evicted
    std::vector<int32_t> bucket;  // [n_layer][n_head_kv][n_cells]

    bool            holds(int32_t il, int32_t j) const { return kept_row(il, 0)[j] >= 0; }
    const int32_t * kept_row(int32_t il, int32_t ih) const { return kept.data() + ((size_t) il * n_head_kv + ih) * n_keep; }
    const int32_t * bucket_row(int32_t il, int32_t ih) const { return bucket.data() + ((size_t) il * n_head_kv + ih) * n_cells; }
};

// n_sink: as select.h's sink_cells. Throws elastic::error naming the first broken rule: kept unique and in range; a rank held by
// all heads of a layer or by none; the first n_sink cells at the first ranks and the last one at the last; pinned cells kept and joined by
// none; every bucket in [-1, n_keep); a kept cell's bucket is its own rank
void validate(const plan & p, const cells & c, int32_t n_sink);

// logical index whose position stands for rank j after compaction: the largest over layers and heads of the j-th
// kept cell in logical order, or less where ranks are masked, so that positions ascend and the last one is the sequence's
// true last  [n_keep]
std::vector<int32_t> rank_positions(const plan & p);

}  // namespace elastic
