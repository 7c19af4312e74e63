// importance -> plan -> merge -> cells freed

#include "core/merge.h"
#include "core/parallel.h"
#include "core/select.h"
#include "runtime/elastic_cache.h"

#include "llama-context.h"
#include "llama-kv-cache.h"

#include <algorithm>

namespace elastic {

// the values of the ranks: of the anchor alone, or summed over what it takes in
static head_map of_ranks(const head_map & m, const plan & p, bool summed) {
    if (m.n_cells == 0) {
        return {};
    }
    head_map res(p.n_layer, p.n_head_kv, p.n_keep);
    for (int32_t il = 0; il < p.n_layer; ++il) {
        for (int32_t ih = 0; ih < p.n_head_kv; ++ih) {
            const int32_t * bucket = p.bucket_row(il, ih);
            const int32_t * kept   = p.kept_row(il, ih);
            const float *   src    = m.row(il, ih);
            float *         dst    = res.row(il, ih);
            for (int32_t i = 0; i < p.n_cells; ++i) {
                if (bucket[i] >= 0 && (summed || kept[bucket[i]] == i)) {
                    dst[bucket[i]] += src[i];
                }
            }
        }
    }
    return res;
}

int32_t elastic_cache::compress(llama_seq_id seq_id) {
    take_logits();
    const int32_t n_target = target_cells(seqs[seq_id].n_tokens);
    if (!seqs[seq_id].pending && n_held(seq_id) <= n_target) {
        return n_cells(seq_id);  // has been, and what the answer goes by stays as it is
    }
    const int32_t n = compress_to(seq_id, n_target, true);
    take_checkpoint(seq_id);
    if (releases()) {
        trim_heap();  // what planning took, megabytes
    }
    return n;
}

int32_t elastic_cache::level(llama_seq_id seq_id) {
    const bool    pending = seqs[seq_id].pending;
    const int32_t n       = compress_to(seq_id, n_held(seq_id), false, true);
    seqs[seq_id].pending  = pending;  // what has come since is still to be compressed
    return n;
}

int32_t elastic_cache::free_cells(llama_seq_id seq_id, int32_t n_new) {
    const auto lacks = [&] {
        return (int32_t) kv.get_cells(seq_id).get_used() + n_new > shape.kv_size;
    };
    if (lacks() && is_waiting(seq_id)) {
        compress(seq_id);
    }
    if (lacks() && !sequence(seq_id).pending && cfg.pol.recompresses()) {
        merge_overdraft_cells(seq_id, 0);
    }
    if (lacks() && n_cells(seq_id) > n_held(seq_id)) {
        level(seq_id);
    }
    return n_cells(seq_id);
}

// an answer is compressed with all that came before it
void elastic_cache::merge_overdraft_cells(llama_seq_id seq_id, int32_t n_new) {
    int32_t n_target = target_cells(seqs[seq_id].n_tokens + n_new);
    if (cfg.max_cells > 0) {
        n_target = std::min(n_target, std::max(cfg.n_sink + 2, cfg.max_cells - cfg.n_overdraft()));
    }
    const bool pending = seqs[seq_id].pending;
    compress_to(seq_id, n_target, false);
    seqs[seq_id].pending = pending;
    note_change(seq_id, kv.seq_pos_max(seq_id) + n_new, true);
}

// what a plan may know of cells of a sequence, in logical order
elastic::cells elastic_cache::describe(llama_seq_id seq_id, const std::vector<int32_t> & rows) const {
    const uint32_t strm  = kv.get_stream(seq_id);
    const auto &   cells = kv.get_cells(seq_id);
    const auto     st    = sequence(seq_id);

    elastic::cells c;
    llama_pos      last = rows.empty() ? 0 : cells.pos_get(rows.front()) - 1;
    for (size_t i = 0; i < rows.size(); ++i) {
        const cell_kind kind    = store->kind(strm, rows[i]);
        const llama_pos pos     = cells.pos_get(rows[i]);
        const bool      is_said = kind == cell_kind::generated && i + text_recent < rows.size();
        c.kind.push_back(kind);
        c.pinned.push_back(0);
        c.old.push_back(kind != cell_kind::image && (pos < st.pos_turn || is_said));
        c.tokens.push_back(std::max(1, pos - last));
        last = pos;
    }
    const auto held = held_rows(strm, rows);
    if (std::any_of(held.begin(), held.end(), [&](int32_t n) { return n < (int32_t) rows.size(); })) {
        for (int32_t il = 0; il < shape.n_layer; ++il) {
            for (const int32_t row : rows) {
                c.absent.push_back(store->is_absent(strm, row, il));
            }
        }
    }
    return c;
}

// n_target: cells that the sequence may hold, shared ones included, on average over the layers
int32_t elastic_cache::compress_to(llama_seq_id seq_id, int32_t n_target, bool answer_next, bool level) {
    // pending shifts and stream copies still have to reach the rows
    ctx.memory_update(false);

    auto & st = seqs[seq_id];

    const uint32_t strm = kv.get_stream(seq_id);

    // cells that another sequence uses too stay as they are, where they are
    const std::vector<int32_t> rows = own_cells(seq_id);

    const elastic::cells c        = describe(seq_id, rows);
    const int32_t        n_all    = n_cells(seq_id);
    const auto           held     = held_rows(strm, rows);
    const int32_t        n_rows   = n_held(seq_id);
    const int32_t        n_own    = average(held);
    const int32_t        n_shared = n_rows - n_own;
    const bool           even     = level || cfg.max_cells > 0;  // places are short

    // with nothing of its own left to spare, the sequence keeps the answer that has begun, or the least that a plan can have
    const int32_t n_floor = n_shared ? std::max(1, std::min(n_generated(seq_id), per_head_recent)) : cfg.n_sink + 1;
    const int32_t n_least = std::min(n_own, n_floor);
    int32_t       n_keep  = std::max(n_least, n_target - n_shared);

    if (!active() || n_keep >= (even ? (int32_t) rows.size() : n_own)) {
        st.pending        = false;
        st.n_prompt_cells = n_all;
        store->rate_image_cells(strm, rows);
        if (store->has_scores()) {
            note_change(seq_id, kv.seq_pos_max(seq_id), false);
        }
        return n_all;
    }

    if (answer_next) {
        n_keep = std::max(n_least, n_keep - cells_for_answer(cfg.pol, c, n_keep));
    }

    ctx.synchronize();

    const int64_t t_plan = ggml_time_us();

    std::vector<kv_layer_access> layers;
    for (int32_t il = 0; il < shape.n_layer; ++il) {
        layers.emplace_back(kv, shape, il, strm);
        layers.back().load_k();
        layers.back().load_v();
    }

    const cell_state before = store->gather(strm, rows);
    const kv_source  source(layers, rows);
    plan_params      params = { n_keep, n_shared ? 0 : cfg.n_sink, {}, n_keep };
    if (!even && (!cfg.layer_share.empty() || cfg.pol.shares_layers())) {
        // the next turn needs places, too
        const int32_t n_places = shape.kv_size - (int32_t) kv.get_cells(seq_id).get_used() + (int32_t) rows.size();
        params.layer_share     = cfg.layer_share;
        params.n_rank_max      = std::max(n_keep, n_places * 3 / 4);
    }

    const int64_t n_bytes = kv_bytes(seq_id);

    const head_map fading = store->gather_fading(strm, rows);
    const head_map window = store->gather_window(strm, rows);

    const importance_map importance = { before.mass, cfg.pol.n_window() > 0 ? window : fading };

    plan p = make_plan(cfg.pol, params, c, importance, &source, n_threads());
    validate(p, c, sink_cells(cfg.pol.select, params));

    store_checkpoints(seq_id);

    const int64_t t_merge = ggml_time_us();

    // the lowest of the sequence's own cells, so that the cells in use stay dense
    std::vector<int32_t> dst(rows);
    std::sort(dst.begin(), dst.end());
    dst.resize(p.n_keep);

    cell_state after = {
        head_map(shape.n_layer, shape.n_head_kv, p.n_keep),
        head_map(shape.n_layer, shape.n_head_kv, p.n_keep, 1.0f),
        head_map(shape.n_layer, shape.n_head_kv, p.n_keep),
    };
    parallel_for(shape.n_layer, n_threads(),
                 [&](int32_t il) { merge_layer(p, cfg.pol.combine, il, layers[il].k, layers[il].v, rows, dst, before, after); });
    for (auto & layer : layers) {
        layer.store();
    }

    commit(seq_id, p, rows, dst);
    store->scatter(strm, dst, after);
    store->set_totals(strm, dst, p.rank_score);
    store->scatter_fading(strm, dst, of_ranks(fading, p, cfg.pol.merges()));

    shrink_v();
    release_rows(strm, n_used(strm));
    release_absent(strm, dst);

    const int64_t t_end = ggml_time_us();

    st.pending = false;
    note_change(seq_id, kv.seq_pos_max(seq_id), true);
    st.n_prompt_cells = n_cells(seq_id);

    stats.n_compressions++;
    stats.n_cells_before = n_rows;
    stats.n_cells_after  = n_held(seq_id);
    stats.n_bytes_before = n_bytes;
    stats.n_bytes_after  = kv_bytes(seq_id);
    stats.t_plan_us += t_merge - t_plan;
    stats.t_merge_us += t_end - t_merge;

    p.weight  = {};  // as large as the scores, and of no more use
    plan_last = std::move(p);

    return st.n_prompt_cells;
}

// the metadata of the cells: rank j now lives in dst[j], at the position plan.h gives it
void elastic_cache::commit(llama_seq_id seq_id, const plan & p, const std::vector<int32_t> & src, const std::vector<int32_t> & dst) {
    const uint32_t strm  = kv.get_stream(seq_id);
    auto &         cells = kv.get_cells_mut(strm);

    struct meta {
        llama_pos         pos;
        llama_kv_cell_ext ext;
        cell_kind         kind;
    };
    std::vector<meta> metas;
    for (const int32_t i : rank_positions(p)) {
        metas.push_back({ cells.pos_get(src[i]), cells.ext_get(src[i]), store->kind(strm, src[i]) });
    }

    for (const int32_t cell : src) {
        cells.rm(cell);
        store->reset_cell(strm, cell, cell_kind::text);
    }
    for (size_t j = 0; j < dst.size(); ++j) {
        cells.pos_set(dst[j], metas[j].pos);
        cells.ext_set(dst[j], metas[j].ext);
        cells.seq_add(dst[j], seq_id);
        store->set_kind(strm, dst[j], metas[j].kind);
    }
    kv.set_head(strm, 0);
}

}  // namespace elastic
