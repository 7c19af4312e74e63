#pragma once

// The logits after a prompt's last token: that token saw cells that are merged by now, so to decode it again would give others.

#include "llama.h"

#include <map>
#include <vector>

namespace elastic {

class prompt_logits {
  public:
    explicit prompt_logits(llama_context & ctx) : ctx(ctx) {}

    // a batch is going to be decoded; `ends`: sequences whose prompt goes on in it. wanted: their logits are to be kept
    void begin_batch(const llama_batch & batch, const std::vector<llama_seq_id> & ends, bool wanted);
    // tokens of the batch were computed
    void computed(int32_t n_tokens) { n_to_compute -= n_tokens; }
    bool in_batch() const { return n_to_compute > 0; }

    // what the last batch said at the end of its prompts, before another one overwrites it
    void collect();

    // after the token before pos_end; empty: not known
    std::vector<float> find(llama_seq_id seq_id, llama_pos pos_end) const;

    void forget(llama_seq_id seq_id) { ends.erase(seq_id); }
    void forget_after(llama_seq_id seq_id, llama_pos p0);
    void clear();

  private:
    struct prompt_end {
        llama_pos          pos_end;
        std::vector<float> logits;
    };
    struct output {
        llama_seq_id seq_id;
        llama_pos    pos_end;
        int32_t      index;  // in the batch
    };

    llama_context & ctx;

    std::map<llama_seq_id, prompt_end> ends;
    std::vector<output>                outputs;           // of the batch that has just been decoded
    int32_t                            n_to_compute = 0;  // tokens of the batch whose results are not there yet
};

}  // namespace elastic
