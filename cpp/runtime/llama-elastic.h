#pragma once

// A seam for cache policies that live outside of llama.cpp: what its patched files call. Included by llama-cparams.h. Everything here is
// inert while no policy is attached to a context (llama_context::set_elastic).

#include "ggml-backend.h"

#include <cstdint>

struct ggml_tensor;
struct llama_memory_context_i;
struct llama_memory_i;
struct llama_ubatch;
struct llm_graph_context;

class llm_graph_result;

struct llama_elastic_i {
    virtual ~llama_elastic_i() = default;

    // the attention of one layer, as llm_graph_context::build_attn_mha; nullptr: the policy has nothing to add to that
    virtual ggml_tensor * build_attn(const llm_graph_context & graph, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_b,
                                     ggml_tensor * kq_mask, ggml_tensor * sinks, float kq_scale, int32_t il) = 0;

    // most nodes that the policy adds to a graph of so many tokens
    virtual uint32_t n_graph_nodes(uint32_t n_tokens) const = 0;

    // the ubatch has its cells, nothing is computed yet. Neither of these may throw
    virtual void on_placed(const llama_ubatch & ubatch, const llama_memory_context_i & mctx)                                   = 0;
    // the ubatch was submitted for computation
    virtual void on_computed(const llama_ubatch & ubatch, const llama_memory_context_i & mctx, const llm_graph_result & graph) = 0;
};

// The memory of a new context, as everybody sees it from now on: it passes on what is done to `memory`, which it owns, and a policy hears
// of it first (watched_memory.h). nullptr stays nullptr
llama_memory_i * llama_elastic_watch(llama_memory_i * memory);
// and the memory behind it, where its kind is asked for
llama_memory_i * llama_elastic_watched(llama_memory_i * memory);

// zeroes K and V buffers; ggml_backend_buffer_clear unless set otherwise for this thread
extern thread_local void (*llama_elastic_clear_buffer)(ggml_backend_buffer_t buffer, uint8_t value);
