#include "runtime/make_room.h"

#include "runtime/pages.h"

#include <algorithm>

namespace elastic {

room_maker::room_maker(cache_parts & parts, checkpoints & kept, prompt_logits & logits)
    : parts(parts), kept(kept), logits(logits), compress_(parts, kept), evict(parts) {}

// a compression that fails leaves the cache as it was, so decoding can go on with all cells
void room_maker::or_log(llama_seq_id seq_id, const std::function<void()> & change) const {
    try {
        change();
    } catch (const std::exception & e) {
        const std::string what = e.what();  // with a traceback where a scorer in Python raised
        log_error("sequence " + std::to_string(seq_id) + " stays uncompressed: " + what.substr(0, what.find('\n')));
    }
}

//
// on request
//

// what is said next is a question about the image
int32_t room_maker::cells_for_question(llama_seq_id seq_id, int32_t n_target) const {
    const auto rows = parts.kv.rows(seq_id);
    const bool asks = !rows.empty() && parts.table.kind(parts.kv.stream(seq_id), rows.back()) == cell_kind::image;
    return asks ? std::min(parts.cfg.n_question, n_target / 5) : 0;
}

int32_t room_maker::compress(llama_seq_id seq_id) {
    logits.collect();
    const auto    st       = parts.seqs.get(seq_id);
    const int32_t n_target = parts.target_cells(st.n_tokens);
    if (!st.pending && parts.n_per_layer(seq_id) <= n_target) {
        return parts.kv.n_cells(seq_id);  // has been, and what the answer goes by stays as it is
    }
    const int32_t n = compress_.run(seq_id, { n_target - cells_for_question(seq_id, n_target), true });
    parts.end_prompt(seq_id);
    kept.take(seq_id, logits.find(seq_id, parts.kv.pos_max(seq_id) + 1));
    if (parts.memory.is_enabled()) {
        trim_heap();  // what planning took, megabytes
    }
    return n;
}

int32_t room_maker::compress_prefix(llama_seq_id seq_id, const budget & keep) {
    logits.collect();
    int32_t n_target = std::max(parts.cfg.min_cells, keep.cells_for(parts.seqs.get(seq_id).n_tokens));
    if (parts.cfg.max_cells > 0) {
        n_target = std::min(n_target, parts.cfg.max_cells);
    }
    const int32_t n = compress_.run(seq_id, { n_target, true });
    parts.end_prompt(seq_id);
    if (parts.memory.is_enabled()) {
        trim_heap();
    }
    return n;
}

int32_t room_maker::equalize_layers(llama_seq_id seq_id) {
    const bool    pending = parts.seqs.get(seq_id).pending;
    const int32_t n       = compress_.run(seq_id, { parts.n_per_layer(seq_id), false, true });

    parts.seqs.at(seq_id).pending = pending;  // what has come since is still to be compressed
    return n;
}

// an answer is compressed with all that came before it
void room_maker::merge_overdraft(llama_seq_id seq_id, int32_t n_new) {
    const auto & cfg      = parts.cfg;
    const auto   st       = parts.seqs.get(seq_id);
    int32_t      n_target = parts.target_cells(st.n_tokens + n_new);
    if (cfg.max_cells > 0) {
        n_target = std::min(n_target, std::max(cfg.n_sink + 2, cfg.max_cells - cfg.n_overdraft()));
    }
    compress_.run(seq_id, { n_target, false });
    parts.seqs.at(seq_id).pending = st.pending;
    parts.seqs.note_change(seq_id, n_new > 0 ? parts.kv.pos_next(seq_id) + n_new - 1 : parts.kv.pos_max(seq_id), true);
}

int32_t room_maker::make_room(llama_seq_id seq_id, int32_t n_new) {
    const auto lacks = [&] {
        return parts.kv.n_free(seq_id) < n_new;
    };
    if (lacks() && !parts.seqs.get(seq_id).pending && parts.cfg.pol.recompresses()) {
        merge_overdraft(seq_id, 0);
    }
    if (lacks() && parts.kv.n_cells(seq_id) > parts.n_per_layer(seq_id)) {
        equalize_layers(seq_id);
    }
    return parts.kv.n_cells(seq_id);
}

int32_t room_maker::n_to_drop(llama_seq_id seq_id) const {
    const auto st = parts.seqs.get(seq_id);
    if (!parts.active || !st.pending || parts.n_generated(seq_id) > 0) {
        return 0;
    }
    const own_cells own = compress_.own(seq_id);
    return std::max(0, own.n_own - std::max(1, parts.target_cells(st.n_tokens) - own.n_shared));
}

//
// before a batch
//

int32_t room_maker::room_under_cap(llama_seq_id seq_id) const {
    return parts.cfg.max_cells > 0 ? parts.cfg.max_cells + parts.n_ubatch - parts.kv.n_cells(seq_id) : INT32_MAX;
}

// What is held and the part stay within max_cells and one ubatch, if the part is no larger than an ubatch.
void room_maker::before_prompt(llama_seq_id seq_id, int32_t n_new) {
    if (parts.kv.n_free(seq_id) < n_new) {
        or_log(seq_id, [&] { make_room(seq_id, n_new); });
    }
    if (n_new > room_under_cap(seq_id)) {
        or_log(seq_id, [&] { compress_.run(seq_id, { parts.cfg.max_cells, false }); });
    }
}

void room_maker::before_answer(llama_seq_id seq_id, int32_t n_new) {
    if (parts.seqs.get(seq_id).pending) {
        or_log(seq_id, [&] { compress(seq_id); });
        parts.end_prompt(seq_id);
    }
    if (!parts.cfg.pol.evicts()) {
        return;
    }
    if (parts.cfg.pol.recompresses() && parts.cfg.n_overdraft() > 0) {
        keep_by_merging(seq_id, n_new);
    } else {
        keep_by_evicting(seq_id);
    }
}

void room_maker::evict_one(llama_seq_id seq_id) {
    kept.before_change(seq_id);
    parts.seqs.note_change(seq_id, parts.kv.pos_next(seq_id), true);
    evict.evict_one(seq_id);
}

// one cell is evicted for each new one
void room_maker::keep_by_evicting(llama_seq_id seq_id) {
    const int32_t n_more  = parts.kv.n_cells(seq_id) - parts.n_per_layer(seq_id);  // of some layers
    int32_t       allowed = parts.target_cells(parts.seqs.get(seq_id).n_tokens + 1);
    if (parts.cfg.max_cells == 0) {
        allowed += n_more;
    } else if (n_more > 0 && parts.kv.n_cells(seq_id) > allowed) {  // a state of a cache without the cap
        or_log(seq_id, [&] { compress_.run(seq_id, { allowed, false }); });
    }
    for (int32_t n = parts.kv.n_cells(seq_id); n + 1 > allowed; --n) {
        evict_one(seq_id);
        if (parts.kv.n_cells(seq_id) == n) {
            break;
        }
    }
}

// the answer goes on as long as its overdraft lasts, then all is compressed
void room_maker::keep_by_merging(llama_seq_id seq_id, int32_t n_new) {
    const auto &  cfg     = parts.cfg;
    const int32_t allowed = parts.target_cells(parts.seqs.get(seq_id).n_tokens + 1);
    // the cap is one of slots in the context, the budget one of what layers hold on average
    const auto    is_over = [&] {
        const bool capped = cfg.max_cells > 0 && parts.kv.n_cells(seq_id) + 1 > cfg.max_cells;
        return capped || parts.kv.n_free(seq_id) < n_new || parts.n_per_layer(seq_id) + 1 > allowed + parts.overdraft(seq_id, allowed);
    };
    if (is_over()) {
        or_log(seq_id, [&] { merge_overdraft(seq_id, 1); });
    }
    if (is_over() && parts.kv.n_cells(seq_id) > parts.n_per_layer(seq_id)) {
        or_log(seq_id, [&] { equalize_layers(seq_id); });
        parts.seqs.note_change(seq_id, parts.kv.pos_next(seq_id), true);
    }
    if (is_over()) {  // nothing could be merged
        evict_one(seq_id);
    }
}

}  // namespace elastic
