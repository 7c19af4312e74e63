#pragma once

// When cells have to be dropped, and how many: after a prompt, for the next token of an answer, under a cap, and where the context is
// full. Says what compressor and evictor do.

#include "runtime/compress.h"
#include "runtime/evict.h"
#include "runtime/prompt_logits.h"

#include <functional>

namespace elastic {

class room_maker {
  public:
    room_maker(cache_parts & parts, checkpoints & kept, prompt_logits & logits);

    // before a batch is placed; n_new: its tokens, of all sequences for an answer. A failure is logged, and the cache stays as it is
    void before_answer(llama_seq_id seq_id, int32_t n_new);
    void before_prompt(llama_seq_id seq_id, int32_t n_new);

    //
    // on request; each returns the cells that the sequence holds after, and throws elastic::error
    //

    // compresses the prompt, if that has not been done
    int32_t compress(llama_seq_id seq_id);
    // compresses what is there now by a budget of its own, for a prompt that others go on from: nothing is taken back to here
    int32_t compress_prefix(llama_seq_id seq_id, const budget & keep);
    // gives all layers as many cells, on average as many as before, so that the sequence takes no more rows than those
    int32_t equalize_layers(llama_seq_id seq_id);
    // where n_new tokens find no free cells: compresses what an answer holds beyond the budget, and equalizes, as far as needed
    int32_t make_room(llama_seq_id seq_id, int32_t n_new);

    // cells of its own that the compression of the sequence's prompt is going to take away; 0 if it has been compressed
    int32_t n_to_drop(llama_seq_id seq_id) const;

    const plan & last_plan() const { return compress_.last_plan(); }

  private:
    cache_parts &   parts;
    checkpoints &   kept;
    prompt_logits & logits;
    compressor      compress_;
    cell_evictor    evict;

    int32_t cells_for_question(llama_seq_id seq_id, int32_t n_target) const;
    // cells that a prompt may take before it is compressed for max_cells
    int32_t room_under_cap(llama_seq_id seq_id) const;

    void merge_overdraft(llama_seq_id seq_id, int32_t n_new);
    void keep_by_merging(llama_seq_id seq_id, int32_t n_new);
    void keep_by_evicting(llama_seq_id seq_id);
    void evict_one(llama_seq_id seq_id);
    void or_log(llama_seq_id seq_id, const std::function<void()> & change) const;
};

}  // namespace elastic
