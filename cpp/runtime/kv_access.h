#pragma once

// Reaches the K and V storage of one stream of a llama_kv_cache as plain rows (core/types.h).

#include "core/policy.h"
#include "core/types.h"

#include <vector>

class llama_kv_cache;

namespace elastic {

// the part of the cache's geometry that is the same for all layers
struct kv_shape {
    std::vector<int32_t> layer_ids;  // model layer of each cache layer
    int32_t              n_layer       = 0;
    int32_t              n_head        = 0;
    int32_t              n_head_kv     = 0;
    int32_t              n_embd_head_k = 0;
    int32_t              n_embd_head_v = 0;
    int32_t              kv_size       = 0;  // cells per stream
    int32_t              n_stream      = 0;
    int64_t              cell_bytes    = 0;  // K and V of one cell, all layers

    // cache layer of a model layer, -1 if it has none
    int32_t index_of(int32_t il_model) const;
};

// K and V of one layer in host memory. Device buffers are copied in by load() and back by store().
class kv_layer_access {
  public:
    kv_layer_access(const llama_kv_cache & kv, const kv_shape & shape, int32_t il_cache, uint32_t strm);

    void load_k();
    void load_v();
    void store();

    // row `from`, head by head, to the rows of `to`; from and to a device no more than that
    void move_heads(int32_t from, const std::vector<int32_t> & to);

    kv_rows k;
    kv_rows v;

  private:
    ggml_tensor *        t_k;
    ggml_tensor *        t_v;
    uint32_t             strm;
    std::vector<uint8_t> buf_k;
    std::vector<uint8_t> buf_v;
};

// keys and values of the given cells for the plan
class kv_source : public row_source {
  public:
    kv_source(std::vector<kv_layer_access> & layers, const std::vector<int32_t> & rows) : layers(layers), rows(rows) {}

    int32_t n_embd_head_k() const override { return layers.front().k.n_embd_head; }
    int32_t n_embd_head_v() const override { return layers.front().v.n_embd_head; }
    void    load_k(int32_t il, int32_t ih, float * dst) const override;
    void    load_v(int32_t il, int32_t ih, float * dst) const override;

  private:
    std::vector<kv_layer_access> & layers;
    const std::vector<int32_t> &   rows;
};

}  // namespace elastic
