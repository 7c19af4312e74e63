#pragma once

// Compresses a sequence: gather -> plan -> merge -> commit.

#include "core/plan.h"
#include "runtime/cache_parts.h"
#include "runtime/checkpoint.h"
#include "runtime/kv_layers.h"

namespace elastic {

struct compression {
    int32_t n_target;          // cells that the sequence may hold, shared ones included, on average over the layers
    bool    answer_next;       // leave the cells free that an answer is going to take
    bool    equalize = false;  // all layers hold as many
};

// the cells of a sequence that no other one uses; others stay as they are, where they are
struct own_cells {
    std::vector<int32_t> rows;             // in logical order
    std::vector<int32_t> cells_per_layer;  // of them
    int32_t              n_own;            // on average over the layers
    int32_t              n_shared;         // cells of other sequences too, on average over the layers
};

class compressor {
  public:
    compressor(cache_parts & parts, checkpoints & kept) : parts(parts), kept(kept) {}

    // returns the cells that the sequence holds after. throws elastic::error, and then the cache is as it was
    int32_t run(llama_seq_id seq_id, const compression & what);

    own_cells own(llama_seq_id seq_id) const;

    const plan & last_plan() const { return plan_last; }

  private:
    cache_parts & parts;
    checkpoints & kept;
    plan          plan_last;

    // what a plan is made of
    struct inputs : own_cells {
        uint32_t              strm;
        cells                 described;
        std::vector<kv_layer> layers;
        cell_state            state;
        importance_map        scores;
        head_map              decayed;
    };

    inputs      gather(llama_seq_id seq_id) const;
    void        load(llama_seq_id seq_id, inputs & in) const;
    cells       describe(llama_seq_id seq_id, const inputs & in) const;
    int32_t     cells_to_keep(llama_seq_id seq_id, const compression & what, const inputs & in) const;
    plan_params params_of(llama_seq_id seq_id, const compression & what, const inputs & in, int32_t n_keep) const;
    void        merge(const plan & p, inputs & in, const std::vector<int32_t> & dst, cell_state & after) const;
    void        commit(llama_seq_id seq_id, const plan & p, const inputs & in, const std::vector<int32_t> & dst, const cell_state & after);
    void        stay_as_it_is(llama_seq_id seq_id, const inputs & in);
};

}  // namespace elastic
