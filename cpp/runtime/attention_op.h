#pragma once

// Attention and its column sums as one op of a ggml graph, for K and V in host memory.

#include "ggml.h"

namespace elastic {

// of one layer, as long as the graph lives
struct attention_op_params {
    float   scale;
    float   soft_cap;        // 0: none
    float * sums = nullptr;  // written when the graph is computed [n_stream][n_head][n_sums][n_kv]; no tensor, so no graph reserves them
};

// f32 [n_embd_head_v * n_head, n_tokens].
// q, k and v are permuted as for ggml_flash_attn_ext; sum_weights f32 [n_sums, n_tokens / n_stream, n_head, n_stream]; bias f32
// [n_kv, 1, n_head_kv, n_stream] and sinks f32 [n_head], or nullptr
ggml_tensor * attention_op(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_mask,
                           ggml_tensor * sum_weights, ggml_tensor * bias, ggml_tensor * sinks, attention_op_params & params);

}  // namespace elastic
