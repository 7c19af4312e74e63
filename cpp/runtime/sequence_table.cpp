#include "runtime/sequence_table.h"

#include <algorithm>

namespace elastic {

void sequence_table::begin_batch() {
    in_prompt.clear();
}

std::vector<batch_part> sequence_table::begin_batch(const llama_batch & batch, const std::function<bool(llama_seq_id)> & is_empty) {
    begin_batch();

    struct part {
        int32_t   n       = 0;
        llama_pos pos_min = 0;
        bool      logits  = false;
    };
    std::map<llama_seq_id, part> parts;
    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        for (int32_t j = 0; j < batch.n_seq_id[i]; ++j) {
            auto & p  = parts[batch.seq_id[i][j]];
            p.pos_min = p.n == 0 ? batch.pos[i] : std::min(p.pos_min, batch.pos[i]);
            p.logits |= batch.logits && batch.logits[i];
            p.n++;
        }
    }

    std::vector<batch_part> res;
    for (const auto & [seq_id, p] : parts) {
        auto & st = states[seq_id];
        if (is_empty(seq_id)) {
            st = {};
        }
        // the first token after a prompt is alone in its batch, wants logits and has a new position; it was chosen by the logits before it
        const bool follows    = st.n_tokens > 0 && p.pos_min > st.pos_prompt && (!st.pending || st.has_output);
        const bool generating = !prefill && p.n == 1 && p.logits && follows;
        in_prompt[seq_id]     = !generating;
        res.push_back({ seq_id, p.n, p.pos_min, !generating });
    }
    return res;
}

void sequence_table::begin_token(llama_seq_id seq_id) {
    states[seq_id].n_unscored++;
}

void sequence_table::begin_prompt(llama_seq_id seq_id, llama_pos pos) {
    note_change(seq_id, pos, false);
    states[seq_id].pos_turn = pos;
}

void sequence_table::add_token(llama_seq_id seq_id, llama_pos pos, int32_t n_cells, bool has_output) {
    auto & st    = states[seq_id];
    st.pos_first = st.n_tokens == 0 ? pos : std::min(st.pos_first, pos);
    st.n_tokens++;
    if (is_prompt(seq_id)) {
        st.pos_prompt     = std::max(st.pos_prompt, pos);
        st.pending        = true;
        st.has_output     = has_output;
        st.n_prompt_cells = n_cells;
    }
}

void sequence_table::scored(llama_seq_id seq_id, llama_pos pos) {
    states[seq_id].n_unscored = 0;
    note_change(seq_id, pos, false);
}

bool sequence_table::is_prompt(llama_seq_id seq_id) const {
    const auto it = in_prompt.find(seq_id);
    return it != in_prompt.end() && it->second;
}

// an answer by its own steps, whatever other sequences are in the batch
bool sequence_table::is_scored(llama_seq_id seq_id) const {
    const auto st = get(seq_id);
    return is_prompt(seq_id) || st.pending || (score_interval > 0 && st.n_unscored >= score_interval);
}

int32_t sequence_table::query_count(llama_seq_id seq_id) const {
    return is_prompt(seq_id) ? 1 : std::max(1, get(seq_id).n_unscored);
}

void sequence_table::note_change(llama_seq_id seq_id, llama_pos pos, bool moved) {
    auto & st      = states[seq_id];
    st.pos_changed = std::max(st.pos_changed, pos);
    if (moved) {
        st.pos_moved = std::max(st.pos_moved, pos);
    }
}

void sequence_table::cut(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int32_t n, int32_t n_cells) {
    auto & st = states[seq_id];
    st.n_tokens -= n;
    if (p0 <= st.pos_first && st.pos_first < p1) {
        st.pos_first = p1;
    }
    st.n_unscored = std::max(0, st.n_unscored - n);
    if (p1 > st.pos_prompt && p0 <= st.pos_prompt) {
        st.pos_prompt = p0 - 1;
        st.has_output = true;
        st.pending    = true;  // what is left of the prompt was not compressed, and may be when its answer begins
    }
    st.n_prompt_cells = std::min(st.n_prompt_cells, n_cells);
}

void sequence_table::shift(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos by) {
    const auto it = states.find(seq_id);
    if (it == states.end()) {
        return;
    }
    for (llama_pos * pos : { &it->second.pos_first, &it->second.pos_prompt, &it->second.pos_moved, &it->second.pos_changed }) {
        if (*pos >= p0 && *pos < p1) {
            *pos += by;
        }
    }
}

sequence_state sequence_table::get(llama_seq_id seq_id) const {
    const auto it = states.find(seq_id);
    return it == states.end() ? sequence_state{} : it->second;
}

std::vector<llama_seq_id> sequence_table::ids() const {
    std::vector<llama_seq_id> res;
    for (const auto & [seq_id, _] : states) {
        res.push_back(seq_id);
    }
    return res;
}

}  // namespace elastic
