#pragma once

// K and V of rows as they were stored in the cache: what checkpoints go by once these rows have changed.

#include "runtime/kv_layers.h"

#include <cstdint>
#include <vector>

namespace elastic {

// of some rows of one layer  [n_head_kv][n_rows][bytes of a head]
struct layer_bytes {
    std::vector<uint8_t> k;
    std::vector<uint8_t> v;
};

layer_bytes read_layer_bytes(const kv_layer & loaded, const std::vector<int32_t> & rows);
layer_bytes read_layer_bytes(const kv_view & kv, uint32_t strm, int32_t il, const std::vector<int32_t> & rows);
void        write_layer_bytes(const kv_view & kv, uint32_t strm, int32_t il, const std::vector<int32_t> & rows, const layer_bytes & bytes);

// as long as those of n_rows rows of the layer
bool are_of(const layer_bytes & bytes, const kv_view & kv, int32_t il, size_t n_rows);

// copied once, for all checkpoints that have some of them
class stored_rows {
  public:
    explicit stored_rows(int32_t n_head_kv) : n_head_kv(n_head_kv) {}

    // the next layer; rows ascend
    void add(std::vector<int32_t> rows, layer_bytes bytes) { layers.push_back({ std::move(rows), std::move(bytes) }); }

    // some of the layer's rows, in this order
    layer_bytes pick(int32_t il, const std::vector<int32_t> & rows) const;

    int64_t n_bytes() const;

  private:
    struct layer {
        std::vector<int32_t> rows;
        layer_bytes          bytes;
    };

    int32_t            n_head_kv;
    std::vector<layer> layers;  // [n_layer]
};

}  // namespace elastic
