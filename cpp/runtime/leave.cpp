// While generating: the prompt is compressed when its first generated token arrives, or some later, and cells leave so that the
// sequence holds what its budget allows.

#include "core/generate.h"
#include "runtime/elastic_cache.h"

#include "llama-impl.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <cmath>

namespace elastic {

// cells of the answer to the last prompt
int32_t elastic_cache::n_generated(llama_seq_id seq_id) const {
    const auto & all = kv.get_cells(seq_id).seq_pos_get(seq_id);
    return (int32_t) std::distance(all.lower_bound({ sequence(seq_id).pos_prompt + 1, 0 }), all.end());
}

bool elastic_cache::is_waiting(llama_seq_id seq_id) const {
    return sequence(seq_id).pending && n_generated(seq_id) > 0;
}

// the answer is to go on with all cells for now; n_new: tokens of the batch
bool elastic_cache::waits(llama_seq_id seq_id, int32_t n_new) const {
    const bool under_cap = cfg.max_cells == 0 || n_cells(seq_id) < cfg.max_cells;
    const bool has_room  = (int32_t) kv.get_cells(seq_id).get_used() + n_new <= shape.kv_size;
    return sequence(seq_id).pending && under_cap && has_room && n_generated(seq_id) < cfg.delay;
}

// a compression that fails leaves the cache as it was, so decoding can go on with all cells
template <typename F> static void or_log(llama_seq_id seq_id, F compress) {
    try {
        compress();
    } catch (const std::exception & e) {
        LLAMA_LOG_ERROR("[elastic] sequence %d stays uncompressed: %s\n", seq_id, e.what());
    }
}

void elastic_cache::compress_pending(llama_seq_id seq_id) {
    or_log(seq_id, [&] { compress(seq_id); });
    seqs[seq_id].pending = false;
}

void elastic_cache::make_room(llama_seq_id seq_id, int32_t n_new) {
    const auto & st = seqs[seq_id];

    if (waits(seq_id, n_new)) {
        return;
    }
    if (st.pending) {
        compress_pending(seq_id);
    }
    if (!cfg.pol.evicts()) {
        return;
    }
    const int32_t n_spare = n_cells(seq_id) - n_held(seq_id);  // of some layers
    int32_t       allowed = target_cells(st.n_tokens + 1);
    if (cfg.pol.recompresses() && cfg.n_overdraft() > 0) {
        return make_room_by_merging(seq_id, allowed, n_new);
    }
    if (cfg.max_cells == 0) {
        allowed += n_spare;
    } else if (n_spare > 0 && n_cells(seq_id) > allowed) {  // a state of a cache without the cap
        or_log(seq_id, [&] { compress_to(seq_id, allowed, false); });
    }
    for (int32_t n = n_cells(seq_id); n + 1 > allowed; --n) {
        store_checkpoints(seq_id);
        note_change(seq_id, kv.seq_pos_max(seq_id) + 1, true);
        let_leave(seq_id);
        if (n_cells(seq_id) == n) {
            break;
        }
    }
}

// allowed: cells by the budget; n_new: tokens of the batch
void elastic_cache::make_room_by_merging(llama_seq_id seq_id, int32_t allowed, int32_t n_new) {
    // the cap is one of places in the context, the budget one of what layers hold on average
    const auto over = [&] {
        const bool full    = (int32_t) kv.get_cells(seq_id).get_used() + n_new > shape.kv_size;
        const bool capped  = cfg.max_cells > 0 && n_cells(seq_id) + 1 > cfg.max_cells;
        const bool is_over = n_held(seq_id) + 1 > allowed + cfg.n_overdraft();
        return full || capped || is_over;
    };
    if (over()) {
        or_log(seq_id, [&] { merge_overdraft_cells(seq_id, 1); });
    }
    if (over() && n_cells(seq_id) > n_held(seq_id)) {
        or_log(seq_id, [&] { level(seq_id); });
        note_change(seq_id, kv.seq_pos_max(seq_id) + 1, true);
    }
    if (over()) {  // nothing could be merged
        store_checkpoints(seq_id);
        note_change(seq_id, kv.seq_pos_max(seq_id) + 1, true);
        let_leave(seq_id);
    }
}

// cells that a prompt may take on top of those it holds before it is compressed for max_cells
int32_t elastic_cache::room_under_cap(llama_seq_id seq_id) const {
    return cfg.max_cells > 0 ? cfg.max_cells + (int32_t) ctx.n_ubatch() - n_cells(seq_id) : INT32_MAX;
}

// Before a part of a prompt is placed: what is held and the part stay within max_cells and one ubatch, if the part
// is no larger than an ubatch.
void elastic_cache::make_room_for_prompt(llama_seq_id seq_id, int32_t n_new) {
    if (n_new <= room_under_cap(seq_id)) {
        return;
    }
    or_log(seq_id, [&] { compress_to(seq_id, cfg.max_cells, false); });
}

void elastic_cache::let_leave(llama_seq_id seq_id) {
    const auto     rows = logical_cells(seq_id);
    const uint32_t strm = kv.get_stream(seq_id);

    elastic::cells     c;
    std::vector<float> total;
    for (const int32_t row : rows) {
        c.kind.push_back(store->kind(strm, row));
        c.pinned.push_back(is_shared(strm, row));
        total.push_back(store->total(strm, row));
    }
    if (cfg.pol.leaves_per_head()) {
        return let_leave_per_head(seq_id, rows, c, total);
    }
    if (cfg.pol.scores_generation()) {
        total = store->sum_mass(strm, rows);
    }

    const int32_t i = leaving_cell(cfg.pol.generate, c, seqs[seq_id].n_prompt_cells, cfg.offset, cfg.n_sink, total);
    if (i >= 0) {
        kv.get_cells_mut(strm).seq_rm(rows[i], seq_id);
        kv.set_head(strm, rows[i]);  // the freed place takes the next token
        stats.n_evictions++;
    }
}

// Every head loses the cell of its own lowest score. The row that is freed is the newest of those that may leave and that all
// layers hold: a head that loses another cell keeps this one in the place of the lost.
void elastic_cache::let_leave_per_head(llama_seq_id seq_id, const std::vector<int32_t> & rows, const elastic::cells & c,
                                       const std::vector<float> & total) {
    const uint32_t strm = kv.get_stream(seq_id);

    std::vector<int32_t> may_leave;
    for (const int32_t i : leaving_candidates(cfg.pol.generate, c, cfg.n_sink, total)) {
        may_leave.push_back(rows[i]);
    }
    if (may_leave.empty()) {
        return;
    }
    const auto held_by_all = [&](int32_t row) {
        for (int32_t il = 0; il < shape.n_layer; ++il) {
            if (store->is_absent(strm, row, il)) {
                return false;
            }
        }
        return true;
    };
    const auto    newest = std::find_if(may_leave.rbegin(), may_leave.rend(), held_by_all);
    const int32_t freed  = newest == may_leave.rend() ? may_leave.back() : *newest;

    const auto [lo, hi]     = std::minmax_element(may_leave.begin(), may_leave.end());
    const int32_t      base = *lo;
    std::vector<float> others(*hi - base + 1, HUGE_VALF);

    const float   decay     = cfg.pol.decay();
    const int64_t n_queries = std::max<int64_t>(1, seqs[seq_id].n_tokens);
    for (int32_t il = 0; il < shape.n_layer; ++il) {
        if (store->is_absent(strm, freed, il)) {
            let_leave_one_layer(strm, il, may_leave);
            continue;
        }
        for (const int32_t row : may_leave) {
            others[row - base] = store->is_absent(strm, row, il) ? HUGE_VALF : 0.0f;
        }
        std::vector<int32_t> lost;
        for (int32_t ih = 0; ih < shape.n_head_kv; ++ih) {
            const float * mass   = store->mass_row(strm, il, ih) + base;
            const float * fading = decay > 0.0f ? store->fading_row(strm, il, ih) + base : nullptr;
            const auto    scores = leaving_scores(others, mass, fading, decay, n_queries);
            lost.push_back(first_lowest(scores, may_leave, base));
        }
        move_rows(strm, il, freed, lost);
    }
    kv.get_cells_mut(strm).seq_rm(freed, seq_id);
    kv.set_head(strm, freed);
    stats.n_evictions++;
}

// Where a layer does without the row that is freed, it does without one more: the one of least importance in all its heads.
void elastic_cache::let_leave_one_layer(uint32_t strm, int32_t il, const std::vector<int32_t> & may_leave) {
    int32_t best = -1;
    float   low  = 0.0f;
    for (const int32_t row : may_leave) {
        float sum = 0.0f;
        for (int32_t ih = 0; ih < shape.n_head_kv; ++ih) {
            sum += store->mass_row(strm, il, ih)[row];
        }
        if (!store->is_absent(strm, row, il) && (best < 0 || sum < low)) {
            best = row;
            low  = sum;
        }
    }
    if (best >= 0) {
        store->make_absent(strm, best, il);
    }
}

// row `from` of one layer, head by head to the rows of `to`
void elastic_cache::move_rows(uint32_t strm, int32_t il, int32_t from, const std::vector<int32_t> & to) {
    if (std::all_of(to.begin(), to.end(), [&](int32_t row) { return row == from; })) {
        return;
    }
    kv_layer_access(kv, shape, il, strm).move_heads(from, to);
    for (int32_t ih = 0; ih < shape.n_head_kv; ++ih) {
        if (to[ih] != from) {
            store->move_head(strm, from, to[ih], il, ih);
        }
    }
}

}  // namespace elastic
