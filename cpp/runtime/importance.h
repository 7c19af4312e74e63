#pragma once

// The attention that each cell received: the sum over all queries, and one that decays with every query of text. Per layer, KV head and
// cell of a stream.

#include "core/types.h"
#include "runtime/lazy_map.h"

#include <vector>

namespace elastic {

// what is kept of every cell
struct importance_needs {
    bool  sum   = false;
    float decay = 0.0f;  // of the decayed sum, per query; 0: it is not kept
};

// importance of some cells, in logical order; no cells where one is not kept
struct cell_importance {
    head_map sum;
    head_map decayed;
};

class importance {
  public:
    importance(int32_t n_layer, int32_t n_head_kv, int32_t kv_size, int32_t n_stream, const importance_needs & needs);

    const importance_needs needs;

    bool has_any() const { return needs.sum || has_decayed(); }
    bool has_decayed() const { return needs.decay > 0.0f; }

    //
    // adding what a graph says
    //

    // before the sums of new queries are added: the decayed sum of each cell by its factor, [n]
    void decay(uint32_t strm, const std::vector<float> & factor);

    float *       sum_row(uint32_t strm, int32_t il, int32_t ih);  // [kv_size], also the next one; nullptr where it is not kept
    float *       decayed_row(uint32_t strm, int32_t il, int32_t ih);
    const float * sum_row(uint32_t strm, int32_t il, int32_t ih) const;

    //
    // cells
    //

    void reset();
    void reset_cell(uint32_t strm, int32_t cell);
    void reset_cell(uint32_t strm, int32_t cell, int32_t il);           // of one layer
    void copy_stream(uint32_t strm_src, uint32_t strm_dst, int32_t n);  // the first n cells
    void move_head(uint32_t strm, int32_t src, int32_t dst, int32_t il, int32_t ih);

    cell_importance gather(uint32_t strm, const std::vector<int32_t> & rows) const;
    void            scatter(uint32_t strm, const std::vector<int32_t> & rows, const cell_importance & values);

    // the sum over layers and heads, [rows]
    std::vector<float> total(uint32_t strm, const std::vector<int32_t> & rows) const;

  private:
    using maps = std::vector<lazy_map>;  // [n_stream] of [n_layer * n_head_kv][kv_size]

    const int32_t n_layer;
    const int32_t n_head_kv;

    maps sums;
    maps decayed;

    int32_t  index(int32_t il, int32_t ih) const { return il * n_head_kv + ih; }
    int32_t  n_rows() const { return n_layer * n_head_kv; }
    void     reset_rows(uint32_t strm, int32_t cell, int32_t first, int32_t n);
    head_map take(const lazy_map & from, const std::vector<int32_t> & rows) const;
};

}  // namespace elastic
