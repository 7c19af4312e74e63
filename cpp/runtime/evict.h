#pragma once

// While generating: one cell of a sequence is evicted for a new token, the same one in all heads, or one of each head's own.

#include "runtime/cache_parts.h"
#include "runtime/head_moves.h"

namespace elastic {

class cell_evictor {
  public:
    explicit cell_evictor(cache_parts & parts) : parts(parts), moves(parts.kv) {}

    // at most one; K and V of a row may move
    void evict_one(llama_seq_id seq_id);

  private:
    cache_parts & parts;
    head_moves    moves;

    // the cells among which one is evicted
    struct choice {
        uint32_t             strm;
        std::vector<int32_t> rows;  // of the sequence, in logical order
        cells                described;
        std::vector<float>   rank_score;  // [rows]
    };

    void                 free_row(llama_seq_id seq_id, uint32_t strm, int32_t row);
    void                 evict_per_head(llama_seq_id seq_id, const choice & from);
    void                 mask_one(uint32_t strm, int32_t il, const std::vector<int32_t> & candidates);
    void                 move_row(uint32_t strm, int32_t from, const std::vector<std::vector<int32_t>> & to);
    std::vector<int32_t> lost_in_layer(uint32_t strm, int32_t il, const std::vector<int32_t> & candidates, int64_t n_queries) const;
    bool                 held_by_all(uint32_t strm, int32_t row) const;
};

}  // namespace elastic
