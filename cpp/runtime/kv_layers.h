#pragma once

// K and V of the layers, in host memory or on a device.

#include "core/policy.h"
#include "kernels/kv_rows.h"
#include "runtime/kv_view.h"

#include <vector>

namespace elastic {

// K and V of one layer in host memory. Device buffers are copied in by load() and back by store().
class kv_layer {
  public:
    kv_layer(ggml_tensor * t_k, ggml_tensor * t_v, const kv_shape & shape, uint32_t strm);

    void load(int32_t n_rows);   // the first ones
    void store(int32_t n_rows);  // of those loaded

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
    kv_source(const std::vector<kv_layer> & layers, const std::vector<int32_t> & rows) : layers(layers), rows(rows) {}

    int32_t n_embd_head_k() const override { return layers.front().k.n_embd_head; }
    int32_t n_embd_head_v() const override { return layers.front().v.n_embd_head; }
    void    load_k(int32_t il, int32_t ih, float * dst) const override;
    void    load_v(int32_t il, int32_t ih, float * dst) const override;

  private:
    const std::vector<kv_layer> & layers;
    const std::vector<int32_t> &  rows;
};

kv_layer              layer_of(const kv_view & kv, int32_t il, uint32_t strm);
std::vector<kv_layer> loaded_layers(const kv_view & kv, uint32_t strm);  // the rows in use
bool                  on_host(const kv_view & kv);                       // all of K and V

}  // namespace elastic
