#pragma once

// Attention and its column sums as one op of a ggml graph, for K and V in host memory.

#include "ggml.h"

namespace elastic {

// f32: first the output [n_embd_head_v, n_head, n_tokens], then the sums [n_kv, n_sums, n_head, n_stream].
// q, k and v are permuted as for ggml_flash_attn_ext; sum_weights f32 [n_sums, n_tokens / n_stream, n_head, n_stream]; bias f32
// [n_kv, 1, n_head_kv, n_stream] or nullptr. kq_scale lives as long as the graph
ggml_tensor * attention_op(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_mask,
                           ggml_tensor * sum_weights, ggml_tensor * bias, const float * kq_scale);

}  // namespace elastic
