#pragma once

// The attention of one layer, with a bias and with column sums, through llama.cpp's own ops: for K and V that lie on a device, and for
// what our own op does not take.

#include "runtime/kv_view.h"

#include "llama-graph.h"

namespace elastic {

enum class attention_way {
    own_op,   // one op of ours computes attention and sums: K and V in host memory
    heads,    // the fused op, with one mask per query head
    streams,  // the fused op takes one mask per stream only, so each KV head is given to it as a stream
    plain,    // without the fused op
};

const char * name_of(attention_way way);

// what the backend of the layer's K and V supports, the fastest first. ELASTIC_ATTENTION = graph, streams or plain is for tests: the
// layer is treated as if its backend had no own op; no mask per head either; no fused op either
attention_way find_way(const kv_view & kv, int32_t il);

struct attention_inputs {
    const llm_graph_context & graph;
    int32_t                   il;  // of the model
    ggml_tensor *             q;   // as llama.cpp has them
    ggml_tensor *             k;
    ggml_tensor *             v;
    ggml_tensor *             q_perm;  // as for ggml_flash_attn_ext
    ggml_tensor *             k_perm;
    ggml_tensor *             v_perm;
    ggml_tensor *             kq_b;
    ggml_tensor *             kq_mask;
    ggml_tensor *             sinks;
    ggml_tensor *             bias;  // f32 [n_kv, 1, n_head_kv, n_stream], or nullptr
    float                     kq_scale;
};

// 0: none
float soft_cap_of(const llm_graph_context & graph);

// As llm_graph_context::build_attn_mha gives it.
//   weights: f32 [n_tokens / n_stream, n_sums, n_head, n_stream], or nullptr: no sums are wanted
//   sums:    f32 [n_kv, n_sums, n_head, n_stream]
ggml_tensor * attention_of_ops(const attention_inputs & in, attention_way way, ggml_tensor * weights, ggml_tensor *& sums);

// most nodes of it, for so many tokens and a full cache
int64_t n_attention_nodes(int64_t n_tokens, const kv_shape & shape);

}  // namespace elastic
