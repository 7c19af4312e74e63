#pragma once

// What tests and pictures want to see of a sequence; nothing here is on the way of decode.

#include "runtime/cache_parts.h"

namespace elastic {

struct cell_info {
    int32_t   index;  // in its stream
    llama_pos pos;
    cell_kind kind;
};

// one layer of a sequence as f32, as stored (after RoPE)
struct kv_values {
    int32_t            n_cells;
    int32_t            n_head_kv;
    int32_t            n_embd_head_k;
    int32_t            n_embd_head_v;
    std::vector<float> k;  // [n_cells][n_head_kv][n_embd_head_k]
    std::vector<float> v;  // [n_cells][n_head_kv][n_embd_head_v]
};

elastic_memory describe_memory(const kv_view & kv);

// all in logical order
std::vector<cell_info> describe_cells(const cache_parts & parts, llama_seq_id seq_id);
kv_values              read_kv(const cache_parts & parts, llama_seq_id seq_id, int32_t il);  // throws elastic::error out of range
head_map               counts_of(const cache_parts & parts, llama_seq_id seq_id);            // tokens merged into each cell
head_map               bias_of(const cache_parts & parts, llama_seq_id seq_id);
cell_importance        importance_of(const cache_parts & parts, llama_seq_id seq_id);
head_map               windowed_of(const cache_parts & parts, llama_seq_id seq_id);  // attention from the last queries

}  // namespace elastic
