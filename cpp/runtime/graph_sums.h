#pragma once

// The column sums of one graph: which layers have them, and where they are once it has been computed.

#include "runtime/attention_graph.h"
#include "runtime/attention_op.h"

#include <deque>

namespace elastic {

// of one layer  [n_stream][n_head][n_rows][n_kv]
struct layer_sums {
    int32_t             il;        // of the cache
    int32_t             il_model;  // others may use K and V of the same layer
    int64_t             n_kv;
    int64_t             n_rows;
    int64_t             n_head;
    int64_t             n_stream;
    ggml_tensor *       tensor = nullptr;  // of llama.cpp's ops
    bool                packed = false;    // copied to device_sums
    attention_op_params op     = {};       // of ours, which says where they are

    size_t n() const { return n_kv * n_rows * n_head * n_stream; }
};

// what one graph was built with, and its sums
class graph_sums : public llm_graph_input_i {
  public:
    graph_sums(attention_graph & owner, const llm_graph_result * graph, bool wanted, bool has_bias);
    ~graph_sums() override;

    void set_input(const llama_ubatch * ubatch) override;
    bool can_reuse(const llm_graph_params & params) override;

    const bool    wanted;
    const bool    has_bias;
    uint32_t      version;  // of what its sums are copied to
    // f32 [n_sums, n_tokens / n_stream, n_head, n_stream] for our op; with the first two the other way round for llama.cpp's
    ggml_tensor * weights[2] = { nullptr, nullptr };

    std::deque<layer_sums> layers;  // which nodes of the graph point to

  private:
    attention_graph &                          owner;
    const llm_graph_result *                   graph;
    std::shared_ptr<attention_graph::registry> graphs;
};

}  // namespace elastic
