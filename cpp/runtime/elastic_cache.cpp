#include "runtime/elastic_cache.h"

#include "runtime/state_io.h"

#include "llama-batch.h"
#include "llama-context.h"

#include <algorithm>

namespace elastic {

elastic_cache::elastic_cache(llama_context & ctx, const config & cfg)
    : ctx(ctx), state(ctx, cfg, (int32_t) ctx.n_threads_batch(), (int32_t) ctx.n_ubatch()), taken(state), logits(ctx), graph(state, logits),
      rooms(state, taken, logits), window(state.kv.parts) {
    check_layers(cfg, state.kv.shape.n_layer);
    const int32_t n_ubatch = (int32_t) ctx.n_ubatch();
    const int32_t n_lacks  = state.kv.parts.n_window_lacks(n_ubatch);
    if (cfg.max_cells > 0 && n_lacks > 0) {
        throw error("[elastic_attach] max_cells: got " + std::to_string(cfg.max_cells) + " in a context of " +
                    std::to_string(state.kv.shape.kv_size) + " cells, where the model's sliding window and a ubatch of " +
                    std::to_string(n_ubatch) + " tokens find no place; expected at least " +
                    std::to_string(state.kv.shape.kv_size + n_lacks) + " cells, or ubatches of at most " +
                    std::to_string(n_ubatch - n_lacks) + " tokens");
    }
}

//
// decode
//

ggml_tensor * elastic_cache::build_attn(const llm_graph_context & ctx_graph, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v,
                                        ggml_tensor * kq_b, ggml_tensor * kq_mask, ggml_tensor * sinks, float kq_scale, int32_t il) {
    return graph.build(ctx_graph, q, k, v, kq_b, kq_mask, sinks, kq_scale, il);
}

uint32_t elastic_cache::n_graph_nodes(uint32_t n_tokens) const {
    return (uint32_t) graph.n_nodes(n_tokens);
}

void elastic_cache::on_batch(const llama_batch & batch) {
    logits.collect();
    if (!state.active) {
        state.seqs.begin_batch();
        return;
    }
    state.memory.before_batch(state.seqs.ids());
    if (probing) {
        state.kv.synchronize();
        window.before_batch(batch);
    }

    std::vector<llama_seq_id> prompts;
    for (const batch_part & part : state.seqs.begin_batch(batch, [&](llama_seq_id id) { return state.kv.n_cells(id) == 0; })) {
        begin_part(part, batch.n_tokens);
        if (part.is_prompt) {
            prompts.push_back(part.seq_id);
        }
    }
    logits.begin_batch(batch, prompts, !probing && state.cfg.n_checkpoints > 0);
}

void elastic_cache::begin_part(const batch_part & part, int32_t n_batch) {
    const auto st = state.seqs.get(part.seq_id);
    if (st.n_tokens == 0) {
        taken.forget(part.seq_id);
        state.windows.forget(part.seq_id);
    }
    if (part.is_prompt) {
        if (!st.pending && st.n_tokens > 0) {  // another prompt begins
            taken.take(part.seq_id, logits.find(part.seq_id, state.kv.pos_max(part.seq_id) + 1));
            state.seqs.begin_prompt(part.seq_id, part.pos_min);
            state.windows.forget(part.seq_id);
        }
        rooms.before_prompt(part.seq_id, part.n_tokens);
    } else {
        rooms.before_answer(part.seq_id, n_batch);
        state.seqs.begin_token(part.seq_id);
    }
    if (!probing) {
        logits.forget(part.seq_id);
    }
}

void elastic_cache::on_placed(const llama_ubatch & ubatch, const llama_memory_context_i & mctx) {
    if (!state.active) {
        return;
    }
    const placed_cells placed = placed_in(mctx);
    for (int32_t s = 0; s < placed.n_stream; ++s) {
        for (int32_t j = 0; j < placed.n_of_stream; ++j) {
            const int32_t i         = s * placed.n_of_stream + j;
            const int32_t row       = placed.rows[s][j];
            const bool    is_prompt = state.seqs.is_prompt(ubatch.seq_id[i][0]);

            state.reset_cell(placed.strm[s], row, !ubatch.token ? cell_kind::image : is_prompt ? cell_kind::text : cell_kind::generated);
            state.memory.wrote(placed.strm[s], row + 1);
            for (int32_t n = 0; n < ubatch.n_seq_id[i]; ++n) {
                const llama_seq_id seq_id = ubatch.seq_id[i][n];
                state.windows.reset_cell(seq_id, row);
                state.seqs.add_token(seq_id, ubatch.pos[i], state.kv.n_cells(seq_id), ubatch.output[i] != 0);
            }
        }
    }
}

void elastic_cache::on_computed(const llama_ubatch & ubatch, const llama_memory_context_i & mctx, const llm_graph_result & result) {
    if (state.active) {
        logits.computed((int32_t) ubatch.n_tokens);
        graph.collect(result, ubatch, mctx);
    }
}

//
// memory
//

// false: what follows would not be as if the cells had never been there
bool elastic_cache::find_removal(llama_seq_id seq_id, llama_pos p0, llama_pos p1, std::vector<removal> & res) const {
    const int32_t n = state.kv.n_cells(seq_id, p0, p1);
    if (n == 0) {
        return true;
    }
    const auto st      = state.seqs.get(seq_id);
    const bool whole   = n == state.kv.n_cells(seq_id) && p0 <= st.pos_first;
    const bool to_end  = p1 > state.kv.pos_max(seq_id);
    const bool in_past = p0 <= (to_end ? st.pos_changed : st.pos_moved);
    const bool is_free = whole || !in_past || taking_back;
    if (to_end && !whole && !taking_back && !state.kv.parts.can_cut(seq_id, p0)) {
        return false;
    }
    const bool restores = !is_free && to_end && taken.find(seq_id, p0);
    if (is_free || restores) {
        res.push_back({ seq_id, n, whole, restores });
    }
    return is_free || restores;
}

void elastic_cache::remove(const removal & r, llama_pos p0, llama_pos p1) {
    if (r.all) {
        forget(r.seq_id);
        return;
    }
    logits.forget_after(r.seq_id, p0);
    if (r.to_checkpoint) {
        taken.restore(r.seq_id, p0);
        return;
    }
    taken.forget_after(r.seq_id, p0);  // those of the time before stay
    state.seqs.cut(r.seq_id, p0, p1, r.n_cells, state.kv.n_cells(r.seq_id) - r.n_cells);
}

// first look, then act: a refusal leaves every sequence as it was
bool elastic_cache::find_removals(llama_seq_id seq_id, llama_pos p0, llama_pos p1, std::vector<removal> & res) const {
    for (const llama_seq_id id : state.seqs.ids()) {
        if (state.active && (seq_id < 0 || id == seq_id) && !find_removal(id, p0, p1, res)) {
            return false;
        }
    }
    return true;
}

bool elastic_cache::can_seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    std::vector<removal> removals;
    return find_removals(seq_id, p0, p1, removals);
}

void elastic_cache::on_seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    std::vector<removal> removals;
    find_removals(seq_id, p0, p1, removals);
    for (const auto & r : removals) {
        remove(r, p0, p1);
    }
}

void elastic_cache::on_seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst) {
    if (!state.active || seq_id_src == seq_id_dst) {
        return;
    }
    state.seqs.at(seq_id_dst) = state.seqs.at(seq_id_src);
    state.windows.copy(seq_id_src, seq_id_dst);
    taken.forget(seq_id_dst);
    logits.forget(seq_id_dst);

    const uint32_t s0 = state.kv.stream(seq_id_src);
    const uint32_t s1 = state.kv.stream(seq_id_dst);
    if (s0 != s1) {
        const int32_t n = state.kv.n_used(s0);
        state.scores.copy_stream(s0, s1, n);
        state.bias.copy_stream(s0, s1, n);
        state.table.copy_stream(s0, s1, n);
        state.memory.wrote(s1, state.kv.shape.kv_size);  // llama.cpp copies all of a stream
        state.memory.dirtied(s1);
    }
}

void elastic_cache::on_seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    state.memory.dirtied(state.kv.stream(seq_id));  // rotates all rows
    taken.forget(seq_id);
    logits.forget(seq_id);
    state.seqs.shift(seq_id, p0, p1, shift);
}

void elastic_cache::on_clear() {
    forget_all();
    state.memory.cleared();
}

void elastic_cache::forget(llama_seq_id seq_id) {
    logits.forget(seq_id);
    taken.forget(seq_id);
    state.windows.forget(seq_id);
    state.seqs.at(seq_id) = {};
}

void elastic_cache::forget_all() {
    state.seqs.clear();
    taken.clear();
    logits.clear();
    state.scores.reset();
    state.windows.clear();
    state.bias.reset();
    state.table.reset();
}

void elastic_cache::state_write(llama_io_write_i & io, llama_seq_id seq_id) {
    write_state(state, taken, io, seq_id);
}

void elastic_cache::state_read(llama_io_read_i & io, llama_seq_id seq_id) {
    if (seq_id < 0) {
        forget_all();
    }
    read_state(state, taken, logits, io, seq_id);
}

// llama.cpp removes what it could not load as a whole
void elastic_cache::on_load_failed() {
    if (empty()) {
        on_clear();
        return;
    }
    for (const llama_seq_id seq_id : state.seqs.ids()) {
        if (state.kv.n_cells(seq_id) == 0) {
            forget(seq_id);
        }
    }
}

//
// callers' side
//

void elastic_cache::begin_probe() {
    if (probing) {
        throw error("[elastic_begin_probe] a probe is running; end it first");
    }
    if (!can_probe()) {
        throw error("[elastic_begin_probe] the model's memory cannot take back what is decoded: " + std::string(state.kv.parts.kind()));
    }
    logits.collect();
    probing.reset(new probe{ state.seqs.is_prefill(), {} });
    for (const llama_seq_id seq_id : state.seqs.ids()) {
        probing->ends[seq_id] = state.kv.pos_max(seq_id) + 1;
    }
    window.begin(probing->ends);
    set_prefill(true);  // to the sequences it is more of their prompts
}

void elastic_cache::end_probe() {
    if (!probing) {
        return;
    }
    const auto ended = std::move(probing);
    set_prefill(ended->was_prefill);
    for (const llama_seq_id seq_id : state.seqs.ids()) {
        const auto      it = ended->ends.find(seq_id);
        const llama_pos p0 = it == ended->ends.end() ? 0 : it->second;  // one that began in it
        if (state.kv.pos_max(seq_id) < p0) {
            continue;
        }
        taking_back = true;
        state.kv.cut(seq_id, p0);
        taking_back = false;

        state.seqs.at(seq_id).pos_changed = p0 - 1;  // the importance is the prompt's as it is now
    }
    state.kv.synchronize();
    window.restore();
}

llama_pos elastic_cache::can_cut(llama_seq_id seq_id, llama_pos p0) const {
    state.check_seq_id(seq_id);
    if (p0 > state.kv.pos_max(seq_id) || !state.active) {
        return std::min(p0, state.kv.pos_next(seq_id));  // 0 where the sequence is empty
    }
    const llama_pos res = p0 > state.seqs.get(seq_id).pos_changed ? p0 : taken.last_before(seq_id, p0);
    return state.kv.parts.can_cut(seq_id, res) ? res : 0;
}

bool elastic_cache::can_probe() const {
    return !state.kv.parts.recurrent;
}

bool elastic_cache::restore_logits(llama_seq_id seq_id) {
    state.check_seq_id(seq_id);
    logits.collect();
    const llama_pos    pos_end = state.kv.pos_max(seq_id) + 1;
    const auto *       ck      = taken.find(seq_id, pos_end);
    std::vector<float> found   = logits.find(seq_id, pos_end);
    if (found.empty() && ck) {
        found = ck->logits;
    }
    const int32_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(&ctx)));
    if (pos_end == 0 || (int32_t) found.size() != n_vocab) {
        return false;
    }
    ctx.set_logits(found.data());
    return true;
}

elastic_stats elastic_cache::stats() const {
    elastic_stats res       = state.stats;
    res.n_bytes_released    = state.memory.bytes_released;
    res.n_bytes_checkpoints = taken.n_bytes();
    return res;
}

void elastic_cache::reset_stats() {
    state.stats                 = {};
    state.memory.bytes_released = 0;
}

}  // namespace elastic
