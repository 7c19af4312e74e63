#pragma once

// The geometry of a KV cache, and where its cells are.

#include "llama.h"

#include <algorithm>
#include <vector>

namespace elastic {

// the part of the cache's geometry that is the same for all layers
struct kv_shape {
    std::vector<int32_t> layer_ids;  // model layer of each cache layer, those without KV heads left out
    std::vector<int32_t> owners;     // [layers of the model]: cache layer whose K and V it attends to, -1: none
    std::vector<int32_t> n_users;    // model layers that attend to each cache layer
    int32_t              n_layer_model = 0;
    int32_t              n_layer       = 0;
    int32_t              n_head        = 0;
    int32_t              n_head_kv     = 0;
    int32_t              n_embd_head_k = 0;
    int32_t              n_embd_head_v = 0;
    int32_t              kv_size       = 0;  // cells per stream
    int32_t              n_stream      = 0;
    int64_t              cell_bytes    = 0;  // K and V of one cell, all layers

    int32_t n_heads() const { return n_layer * n_head_kv; }

    // cache layer whose K and V a model layer attends to, -1 if there is none
    int32_t index_of(int32_t il_model) const { return owners[il_model]; }
};

// what llama.cpp knows of a cell: its position, its token, and under M-RoPE where in its image it lies
struct cell_place {
    llama_pos   pos   = 0;
    llama_pos   x     = 0;
    llama_pos   y     = 0;
    llama_token token = LLAMA_TOKEN_NULL;

    bool      operator==(const cell_place & o) const { return pos == o.pos && x == o.x && y == o.y; }
    // a position that no token up to this one of its sequence takes: behind an image its height and width count
    llama_pos next() const { return std::max({ pos, x, y }) + 1; }
};

// the cells of one ubatch
struct placed_cells {
    int32_t n_stream    = 0;
    int32_t n_of_stream = 0;  // tokens per stream

    std::vector<uint32_t>             strm;  // [n_stream]
    std::vector<std::vector<int32_t>> rows;  // [n_stream][n_of_stream]
};

}  // namespace elastic
