#pragma once

// Where the column sums of a generated token are collected on a device, so that they come to the host in one transfer for all layers.

#include "runtime/kv_view.h"

#include "ggml-cpp.h"

#include <cstdint>
#include <vector>

namespace elastic {

class device_sums {
  public:
    explicit device_sums(const kv_view & kv) : kv(kv), slots(kv.shape.owners.size()) {}

    void use(int32_t il) { layers.push_back(il); }  // of the model, before anything else: its sums are collected here

    // room for n numbers of each layer; what graphs were given before is gone if it grows
    void     reserve(int64_t n);
    uint32_t version() const { return n_grown; }

    // f32 [n], beside the layer's keys; of one graph all layers have as many
    ggml_tensor * place(ggml_context * ctx, int32_t il, int64_t n) const;

    void          fetch(int64_t n);  // n numbers of each layer; waits for the device
    const float * of(int32_t il, int64_t n) const { return blocks[slots[il].block].data.data() + slots[il].index * n; }

  private:
    struct block {  // of the layers of one buffer type
        ggml_context_ptr        ctx;
        ggml_backend_buffer_ptr buf;
        ggml_tensor *           tensor;  // f32 [capacity * n_layers], one layer's numbers behind another's
        int64_t                 n_layers;
        std::vector<float>      data;
    };
    struct slot {
        size_t  block;
        int64_t index;
    };

    const kv_view &      kv;
    std::vector<int32_t> layers;
    std::vector<slot>    slots;  // of the layers of the model
    std::vector<block>   blocks;
    int64_t              capacity = 0;
    uint32_t             n_grown  = 0;
};

}  // namespace elastic
