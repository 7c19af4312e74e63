#include "runtime/prompt_logits.h"

#include <algorithm>

namespace elastic {

void prompt_logits::begin_batch(const llama_batch & batch, const std::vector<llama_seq_id> & prompts, bool wanted) {
    outputs.clear();
    n_to_compute = batch.n_tokens;
    if (!wanted) {
        return;
    }
    std::map<llama_seq_id, int32_t> last;
    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        for (int32_t j = 0; j < batch.n_seq_id[i]; ++j) {
            last[batch.seq_id[i][j]] = i;
        }
    }
    for (const llama_seq_id seq_id : prompts) {
        const int32_t i = last.at(seq_id);
        if (batch.logits && batch.logits[i]) {
            outputs.push_back({ seq_id, batch.pos[i] + 1, i });
        }
    }
}

void prompt_logits::collect() {
    const auto wanted = std::move(outputs);
    outputs.clear();
    if (wanted.empty() || in_batch() || !llama_get_logits(&ctx)) {
        return;
    }
    const int32_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(&ctx)));
    for (const auto & out : wanted) {
        if (const float * row = llama_get_logits_ith(&ctx, out.index)) {
            ends[out.seq_id] = { out.pos_end, { row, row + n_vocab } };
        }
    }
}

std::vector<float> prompt_logits::find(llama_seq_id seq_id, llama_pos pos_end) const {
    const auto it = ends.find(seq_id);
    return it != ends.end() && it->second.pos_end == pos_end ? it->second.logits : std::vector<float>();
}

void prompt_logits::forget_after(llama_seq_id seq_id, llama_pos p0) {
    const auto it = ends.find(seq_id);
    if (it != ends.end() && it->second.pos_end > p0) {
        ends.erase(it);
    }
}

void prompt_logits::clear() {
    ends.clear();
    outputs.clear();
}

}  // namespace elastic
