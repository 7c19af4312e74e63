#pragma once

// K and V of the layers, in host memory or on a device.

#include "core/policy.h"
#include "kernels/kv_rows.h"
#include "runtime/kv_view.h"

#include <memory>
#include <vector>

namespace elastic {

// Rows of a device. Not a vector, which would write zeros first: of a long prompt they are gigabytes.
class host_copy {
  public:
    // the system hands its pages out here, and not while a backend copies into them
    void resize(size_t n) {
        bytes.reset(new uint8_t[n]);
        n_bytes = n;
        for (size_t i = 0; i < n; i += 4096) {
            bytes[i] = 0;
        }
    }
    uint8_t *       data() { return bytes.get(); }
    const uint8_t * data() const { return bytes.get(); }
    size_t          size() const { return n_bytes; }

  private:
    std::unique_ptr<uint8_t[]> bytes;
    size_t                     n_bytes = 0;
};

// K and V of one layer in host memory. Device buffers are copied in by load() and back by store().
class kv_layer {
  public:
    kv_layer(ggml_tensor * t_k, ggml_tensor * t_v, const kv_shape & shape, uint32_t strm);

    void reserve(int32_t n_rows);  // host memory for so many; no backend is called
    void load(int32_t n_rows);     // the first ones
    void store(int32_t n_rows);    // of those loaded

    // row `from`, head by head, to the rows of `to`; from and to a device no more than that
    void move_heads(int32_t from, const std::vector<int32_t> & to);

    kv_rows k;
    kv_rows v;

  private:
    ggml_tensor * t_k;
    ggml_tensor * t_v;
    uint32_t      strm;
    host_copy     buf_k;
    host_copy     buf_v;
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
std::vector<kv_layer> loaded_layers(const kv_view & kv, uint32_t strm, int32_t n_threads);  // the rows in use
bool                  on_host(const kv_view & kv);                                          // all of K and V

}  // namespace elastic
