#pragma once

// The state of one elastic cache, and what follows from several parts of it at once.

#include "core/merge.h"
#include "runtime/cell_table.h"
#include "runtime/config.h"
#include "runtime/elastic.h"
#include "runtime/importance.h"
#include "runtime/kv_view.h"
#include "runtime/layer_bias.h"
#include "runtime/query_windows.h"
#include "runtime/resident_memory.h"
#include "runtime/sequence_table.h"

namespace elastic {

struct cache_parts {
    // n_threads: of compressions, unless cfg says
    cache_parts(llama_context & ctx, const config & cfg, int32_t n_threads, int32_t n_ubatch);

    const config  cfg;
    const bool    active;  // some cell may be dropped
    const int32_t n_threads;
    const int32_t n_ubatch;

    kv_view         kv;
    const bool      on_device;  // some of K and V
    sequence_table  seqs;
    importance      scores;
    query_windows   windows;
    layer_bias      bias;
    cell_table      table;
    resident_memory memory;
    elastic_stats   stats = {};

    void check_seq_id(llama_seq_id seq_id) const;  // throws elastic::error out of [0, n_seq_max)

    // cells that the budget allows after n_tokens tokens
    int32_t target_cells(int64_t n_tokens) const;

    // cells beyond the allowed ones that the sequence's answer may take before it is compressed
    int32_t overdraft(llama_seq_id seq_id, int32_t allowed) const;

    std::vector<int32_t> cells_per_layer(llama_seq_id seq_id) const;  // [n_layer]
    int32_t              n_per_layer(llama_seq_id seq_id) const;      // the average, rounded up
    int64_t              kv_bytes(llama_seq_id seq_id) const;         // K, V and bias of what its layers hold
    int32_t              n_generated(llama_seq_id seq_id) const;      // cells of the answer to the last prompt

    // nothing of the prompt is to be compressed any more, and what its last queries looked at is of no use
    void end_prompt(llama_seq_id seq_id);

    // an ordinary, new cell
    void reset_cell(uint32_t strm, int32_t row, cell_kind kind);
    // what head (il, ih) holds in `src` is now what it holds in `dst`, K and V aside
    void move_head(uint32_t strm, int32_t src, int32_t dst, int32_t il, int32_t ih);
    // the cell is masked in the layer from now on
    void mask(uint32_t strm, int32_t row, int32_t il);
};

// over the layers, rounded up
int32_t average(const std::vector<int32_t> & of_layers);

}  // namespace elastic
