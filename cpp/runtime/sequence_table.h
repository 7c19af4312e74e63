#pragma once

// The stage of each sequence: whether a batch brings a prompt or goes on with an answer, and what has come so far. Knows nothing
// of cells, nor of llama.cpp but its batches.

#include "llama.h"

#include <cstdint>
#include <functional>
#include <map>
#include <vector>

namespace elastic {

struct sequence_state {
    int64_t   n_tokens       = 0;      // decoded since the sequence was last empty
    llama_pos pos_first      = 0;      // of the first token that is there, or stood for by a cell
    llama_pos pos_prompt     = -1;     // last position that came in as a prompt
    llama_pos pos_turn       = 0;      // where the last prompt began
    llama_pos pos_moved      = -1;     // last position before which rows were merged, evicted or moved
    llama_pos pos_changed    = -1;     // last position that changed more than it added: moved rows, importance, the stage
    int32_t   n_prompt_cells = 0;      // held right after the last prompt (P)
    bool      pending        = false;  // prompt tokens wait to be compressed
    bool      has_output     = true;   // the last of them wanted logits, so an answer may follow
    int32_t   n_unscored     = 0;      // generated tokens since the attention was last added to the importance
};

// what a batch brings to one sequence
struct batch_part {
    llama_seq_id seq_id;
    int32_t      n_tokens;
    llama_pos    pos_min;
    bool         is_prompt;
};

class sequence_table {
  public:
    // score_interval: tokens of an answer between two whose attention is added to the importance; 0: none is
    explicit sequence_table(int32_t score_interval) : score_interval(score_interval) {}

    // while set, batches of one token are part of a prompt
    void set_prefill(bool value) { prefill = value; }
    bool is_prefill() const { return prefill; }

    // The stage of every sequence in the batch. A sequence that has no cells begins anew.
    std::vector<batch_part> begin_batch(const llama_batch & batch, const std::function<bool(llama_seq_id)> & is_empty);
    void                    begin_batch();                                     // nothing of it is looked at
    void                    begin_token(llama_seq_id seq_id);                  // of an answer
    void                    begin_prompt(llama_seq_id seq_id, llama_pos pos);  // behind what is compressed already
    void                    add_token(llama_seq_id seq_id, llama_pos pos, int32_t n_cells, bool has_output);
    void                    scored(llama_seq_id seq_id, llama_pos pos);  // the token's attention was added

    bool    is_prompt(llama_seq_id seq_id) const;  // in the current batch
    // whether the attention of its tokens is added to the importance
    bool    is_scored(llama_seq_id seq_id) const;
    // what a query counts for: a generated token stands for those since the last one that was added
    int32_t query_count(llama_seq_id seq_id) const;

    // pos: last position that the change is due to; moved: rows before it were merged, evicted or moved
    void note_change(llama_seq_id seq_id, llama_pos pos, bool moved);
    // n tokens at positions [p0, p1) are gone, and n_cells cells are left
    void cut(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int32_t n, int32_t n_cells);
    void shift(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos by);

    sequence_state &          at(llama_seq_id seq_id) { return states[seq_id]; }
    sequence_state            get(llama_seq_id seq_id) const;
    std::vector<llama_seq_id> ids() const;
    void                      clear() { states.clear(); }

  private:
    const int32_t score_interval;

    std::map<llama_seq_id, sequence_state> states;
    std::map<llama_seq_id, bool>           in_prompt;  // in the current batch
    bool                                   prefill = false;
};

}  // namespace elastic
