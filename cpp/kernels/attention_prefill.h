#pragma once

// Attention that also says how much each cell was attended to. An attention that never writes its weights
// out has no sums of them, and one that does writes n_kv * n_tokens * n_head numbers: here a few queries are finished at a
// time, their weights are summed while they are in the cache, and cells that none of them may see are skipped.

#include "kernels/kv_rows.h"

#include <cstdint>

namespace elastic {

// one stream
struct attention {
    int32_t n_q    = 0;
    int32_t n_kv   = 0;  // cells [0, n_kv)
    int32_t n_head = 0;  // of queries, a multiple of k.n_head_kv

    const float * q             = nullptr;  // element e of head h of query i lies at q[i*q_stride + h*q_stride_head + e]
    int64_t       q_stride      = 0;
    int64_t       q_stride_head = 0;

    kv_rows k;
    kv_rows v;
    float   scale = 1.0f;

    // 0 or -infinity, [n_q][mask_stride]
    const void * mask        = nullptr;
    ggml_type    mask_type   = GGML_TYPE_F32;  // or F16
    int64_t      mask_stride = 0;

    // added to the scaled logits  [k.n_head_kv][bias_stride]; may be nullptr. -infinity, in all heads: nobody sees the cell
    const float * bias        = nullptr;
    int64_t       bias_stride = 0;

    float         soft_cap = 0.0f;     // > 0: scaled logits x become soft_cap * tanh(x / soft_cap), before bias and mask
    const float * sinks    = nullptr;  // [n_head] logits that take a share of the attention, or nullptr

    // of each query in each sum  [n_q][n_sums]
    const float * weights = nullptr;
    int32_t       n_sums  = 0;

    float * out  = nullptr;  // [n_q][n_head][v.n_embd_head]
    float * sums = nullptr;  // [n_head][n_sums][n_kv]
};

// the heads [first, last)
void attend(const attention & a, int32_t first, int32_t last);

}  // namespace elastic
