#pragma once

// What else is known of each cell: its kind, the tokens merged into it, and the score that its rank had in the last plan.

#include "core/types.h"
#include "runtime/lazy_map.h"

#include <cmath>
#include <vector>

namespace elastic {

class cell_table {
  public:
    // counts: tokens merged into each cell are counted, per layer and KV head
    cell_table(int32_t n_layer, int32_t n_head_kv, int32_t kv_size, int32_t n_stream, bool counts);

    bool has_counts() const { return !merged.empty(); }

    cell_kind kind(uint32_t strm, int32_t cell) const { return kinds[strm][cell]; }
    void      set_kind(uint32_t strm, int32_t cell, cell_kind kind) { kinds[strm][cell] = kind; }

    // summed over layers and heads, by which a cell may be evicted while generating; infinite: it says nothing
    float              rank_score(uint32_t strm, int32_t cell) const { return scores[strm][cell]; }
    std::vector<float> rank_scores(uint32_t strm, const std::vector<int32_t> & rows) const;
    void               set_rank_scores(uint32_t strm, const std::vector<int32_t> & rows, const std::vector<float> & values);

    // tokens that cells in logical order stand for, 1 for an ordinary one
    head_map counts(uint32_t strm, const std::vector<int32_t> & rows) const;
    void     set_counts(uint32_t strm, const std::vector<int32_t> & rows, head_map values);

    void reset();  // kinds stay, they are of no cell
    void reset_cell(uint32_t strm, int32_t cell, cell_kind kind);
    void reset_counts(uint32_t strm, int32_t cell, int32_t il);
    void copy_stream(uint32_t strm_src, uint32_t strm_dst, int32_t n);
    void move_head(uint32_t strm, int32_t src, int32_t dst, int32_t il, int32_t ih);

  private:
    const int32_t n_layer;
    const int32_t n_head_kv;

    std::vector<std::vector<cell_kind>> kinds;   // [n_stream][kv_size]
    std::vector<std::vector<float>>     scores;  // [n_stream][kv_size]
    std::vector<lazy_map>               merged;  // [n_stream]: beside the cell's own token
};

}  // namespace elastic
