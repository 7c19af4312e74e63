#pragma once

// What an elastic cache adds to the graph of a layer's attention: the column sums that the importance is made of, and the bias of
// merged cells. And what comes of the sums when the graph has been computed.

#include "runtime/attention_ops.h"
#include "runtime/cache_parts.h"
#include "runtime/device_sums.h"
#include "runtime/prompt_logits.h"

#include "llama-graph.h"

#include <memory>

namespace elastic {

class graph_sums;
struct layer_sums;

class attention_graph {
  public:
    attention_graph(cache_parts & parts, const prompt_logits & logits);

    // the attention of one layer as llm_graph_context::build_attn_mha gives it; nullptr: the cache has nothing to add
    ggml_tensor * build(const llm_graph_context & graph, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_b,
                        ggml_tensor * kq_mask, ggml_tensor * sinks, float kq_scale, int32_t il);

    // most nodes that `build` adds to a graph of n_tokens
    int64_t n_nodes(int64_t n_tokens) const;

    // adds the sums of a graph that was computed for the ubatch to the importance
    void collect(const llm_graph_result & graph, const llama_ubatch & ubatch, const llama_memory_context_i & mctx);

    // sums of each ubatch: over all queries, decayed, and single queries of the window
    uint32_t                           n_sums(const llama_ubatch & ubatch) const;
    bool                               wants_sums(const llama_ubatch & ubatch) const;
    bool                               has_bias() const { return parts.bias.any(); }
    // how the attention of each layer of the cache is computed
    const std::vector<attention_way> & layer_ways() const { return ways; }
    // dst f32 [n_sums, n_tokens / n_stream, n_head, n_stream]: the weight of each query in each sum; by_sum: the first two swapped
    void set_weights(float * dst, const llama_ubatch & ubatch, int64_t n_head, int64_t n_stream, bool by_sum) const;

  private:
    cache_parts &         parts;
    const prompt_logits & logits;

    std::vector<attention_way> ways;            // [n_layer]
    bool                       own_op;          // in all layers
    bool                       in_ops = false;  // llama.cpp builds attention for us, and asks again
    device_sums                on_device;

    // where our op writes the sums of all layers, of the graph that is computed: memory of what it attends to, not of the context
    std::unique_ptr<float[]> buffer;
    size_t                   n_buffer = 0;

    // of each graph that exists; graphs may outlive this object
    using registry                   = std::map<const llm_graph_result *, graph_sums *>;
    std::shared_ptr<registry> graphs = std::make_shared<registry>();

    friend class graph_sums;

    // queries of an ubatch that are among the last ones of a sequence's prompt
    struct window_part {
        llama_seq_id       seq_id;
        int32_t            n_queries;
        int32_t            first;  // row of a cell of the sequence
        std::vector<float> held;   // 1 for its cells from there on, 0 for others
    };
    // what an ubatch brings to a stream
    struct stream_part {
        uint32_t                 strm;
        std::vector<float>       used;  // 1 for cells in use, up to the last one
        std::vector<window_part> windows;
    };

    graph_sums &  sums_of(const llm_graph_context & graph);
    ggml_tensor * weights_of(const llm_graph_context & graph, graph_sums & sums, const ggml_tensor * q, bool by_sum) const;

    void          add_sums(const llm_graph_context & graph, graph_sums & sums, ggml_tensor * t, int32_t il, int32_t il_cache);
    ggml_tensor * build_with_op(const attention_inputs & in, int32_t il_cache, graph_sums & sums);

    bool is_scored(const llama_ubatch & ubatch, int64_t i) const { return parts.seqs.is_scored(ubatch.seq_id[i][0]); }
    bool any_scored(const llama_ubatch & ubatch) const;
    bool decays(const llama_ubatch & ubatch) const;

    // sequences whose window the token's query is a part of
    std::vector<llama_seq_id> windows_of(const llama_ubatch & ubatch, int64_t i) const;

    std::vector<float>       decay_factors(const llama_ubatch & ubatch, uint32_t strm, int64_t first, int64_t n) const;
    std::vector<window_part> begin_queries(const llama_ubatch & ubatch, int64_t first, int64_t n);
    float *                  reserve_sums(size_t n);
    void                     add_layer(const layer_sums & sums, const llama_ubatch & ubatch, const std::vector<stream_part> & streams);
};

}  // namespace elastic
