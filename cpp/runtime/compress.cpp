#include "runtime/compress.h"

#include "core/merge.h"
#include "kernels/parallel.h"

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

int32_t compressor::run(llama_seq_id seq_id, const compression & what) {
    parts.kv.settle();

    inputs        in     = gather(seq_id);
    const int32_t n_keep = cells_to_keep(seq_id, what, in);
    if (n_keep == 0) {
        stay_as_it_is(seq_id, in);
        return parts.kv.n_cells(seq_id);
    }

    const int64_t t_plan = ggml_time_us();
    load(seq_id, in);
    const kv_source   source(in.layers, in.rows);
    const plan_params params = params_of(seq_id, what, in, n_keep);
    plan              p      = make_plan(parts.cfg.pol, params, in.described, in.scores, &source, parts.n_threads);
    validate(p, in.described, sink_cells(parts.cfg.pol.select, params));

    const int64_t n_bytes = parts.kv_bytes(seq_id);
    kept.before_change(seq_id, in.layers);

    const int64_t t_merge = ggml_time_us();

    // the lowest of the sequence's own rows, so that the cells in use stay dense
    std::vector<int32_t> dst(in.rows);
    std::sort(dst.begin(), dst.end());
    dst.resize(p.n_keep);

    cell_state after;
    merge(p, in, dst, after);
    commit(seq_id, p, in, dst, after);

    auto & stats = parts.stats;
    stats.n_compressions++;
    stats.n_cells_before = in.n_own + in.n_shared;
    stats.n_cells_after  = parts.n_per_layer(seq_id);
    stats.n_bytes_before = n_bytes;
    stats.n_bytes_after  = parts.kv_bytes(seq_id);
    stats.n_bytes_other  = parts.kv.parts.in_use(seq_id).other;
    stats.t_plan_us += t_merge - t_plan;
    stats.t_merge_us += ggml_time_us() - t_merge;

    p.weight  = {};  // as large as the scores, and of no more use
    plan_last = std::move(p);

    return parts.kv.n_cells(seq_id);
}

own_cells compressor::own(llama_seq_id seq_id) const {
    own_cells res;
    res.rows            = parts.kv.own_rows(seq_id);
    res.cells_per_layer = parts.bias.cells_per_layer(parts.kv.stream(seq_id), res.rows);
    res.n_own           = average(res.cells_per_layer);
    res.n_shared        = parts.n_per_layer(seq_id) - res.n_own;
    return res;
}

compressor::inputs compressor::gather(llama_seq_id seq_id) const {
    inputs in{ own(seq_id) };
    in.strm      = parts.kv.stream(seq_id);
    in.described = describe(seq_id, in);
    return in;
}

void compressor::load(llama_seq_id seq_id, inputs & in) const {
    in.layers = loaded_layers(parts.kv, in.strm, parts.n_threads);

    cell_importance scores = parts.scores.gather(in.strm, in.rows);
    in.state               = { scores.sum, parts.table.counts(in.strm, in.rows), parts.bias.gather(in.strm, in.rows) };
    in.scores.sum          = in.state.importance;
    in.scores.recent       = parts.cfg.pol.n_window() > 0 ? parts.windows.sum(seq_id, in.rows) : scores.decayed;
    in.decayed             = std::move(scores.decayed);
}

// Tokens that each cell stands for: those since the cell before it. Inside an image that shares one position its grid says so, as wide
// as its cells lie apart.
static std::vector<int32_t> tokens_between(const std::vector<cell_place> & places) {
    std::vector<int32_t> res;
    for (size_t first = 0, end = 0; first < places.size(); first = end) {
        for (end = first; end < places.size() && places[end].pos == places[first].pos;) {
            ++end;
        }
        const auto by_x = [](const cell_place & a, const cell_place & b) {
            return a.x < b.x;
        };
        const auto      range = std::minmax_element(places.begin() + first, places.begin() + end, by_x);
        const int32_t   width = range.second->x - range.first->x + 1;
        const llama_pos next  = first == 0 ? places[0].pos : places[first - 1].next();
        res.push_back(std::max(1, places[first].pos - next + 1));
        for (size_t i = first + 1; i < end; ++i) {
            res.push_back(std::max(1, (places[i].y - places[i - 1].y) * width + places[i].x - places[i - 1].x));
        }
    }
    return res;
}

// what a plan may know of the cells
cells compressor::describe(llama_seq_id seq_id, const inputs & in) const {
    const auto    st = parts.seqs.get(seq_id);
    const int32_t n  = (int32_t) in.rows.size();

    std::vector<cell_place> places;
    for (const int32_t row : in.rows) {
        places.push_back(parts.kv.place(in.strm, row));
    }
    cells c;
    c.tokens = tokens_between(places);
    for (int32_t i = 0; i < n; ++i) {
        const cell_kind kind    = parts.table.kind(in.strm, in.rows[i]);
        const llama_pos pos     = places[i].pos;
        const bool      is_said = kind == cell_kind::generated && i + text_recent < n;
        c.kind.push_back(kind);
        c.pinned.push_back(0);
        c.old.push_back(kind != cell_kind::image && (pos < st.pos_turn || is_said));
    }
    if (std::any_of(in.cells_per_layer.begin(), in.cells_per_layer.end(), [&](int32_t held) { return held < n; })) {
        for (int32_t il = 0; il < parts.kv.shape.n_layer; ++il) {
            for (const int32_t row : in.rows) {
                c.masked.push_back(parts.bias.is_masked(in.strm, row, il));
            }
        }
    }
    return c;
}

// of the sequence's own; 0: all, nothing has to be dropped
int32_t compressor::cells_to_keep(llama_seq_id seq_id, const compression & what, const inputs & in) const {
    const auto & cfg  = parts.cfg;
    const bool   even = what.equalize || cfg.max_cells > 0;  // slots are short

    // with nothing of its own to drop, the sequence keeps the answer that has begun, or the least that a plan can have
    const int32_t n_answer = std::max(1, std::min(parts.n_generated(seq_id), per_head_recent));
    const int32_t n_least  = std::min(in.n_own, in.n_shared > 0 ? n_answer : cfg.n_sink + 1);
    const int32_t n_keep   = std::max(n_least, what.n_target - in.n_shared);
    if (!parts.active || n_keep >= (even ? (int32_t) in.rows.size() : in.n_own)) {
        return 0;
    }
    return what.answer_next ? std::max(n_least, n_keep - cells_for_answer(cfg.pol, in.described, n_keep)) : n_keep;
}

plan_params compressor::params_of(llama_seq_id seq_id, const compression & what, const inputs & in, int32_t n_keep) const {
    const auto & cfg = parts.cfg;
    plan_params  res = { n_keep, in.n_shared > 0 ? 0 : cfg.n_sink, {}, n_keep };
    if (!what.equalize && cfg.max_cells == 0 && (!cfg.layer_share.empty() || cfg.pol.shares_layers())) {
        // the next turn needs slots, too
        const int32_t n_slots = parts.kv.n_free(seq_id) + (int32_t) in.rows.size();
        res.layer_share       = cfg.layer_share;
        res.n_rank_max        = std::max(n_keep, n_slots * 3 / 4);
    }
    return res;
}

void compressor::stay_as_it_is(llama_seq_id seq_id, const inputs & in) {
    auto & st         = parts.seqs.at(seq_id);
    st.pending        = false;
    st.n_prompt_cells = parts.kv.n_cells(seq_id);

    // image cells may be evicted by their importance
    std::vector<int32_t> image;
    for (const int32_t row : in.rows) {
        if (parts.table.kind(in.strm, row) == cell_kind::image) {
            image.push_back(row);
        }
    }
    parts.table.set_rank_scores(in.strm, image, parts.scores.total(in.strm, image));
    if (parts.scores.has_any()) {
        parts.seqs.note_change(seq_id, parts.kv.pos_max(seq_id), false);
    }
}

// K and V, rank j into row dst[j]
void compressor::merge(const plan & p, inputs & in, const std::vector<int32_t> & dst, cell_state & after) const {
    after = {
        head_map(p.n_layer, p.n_head_kv, p.n_keep),
        head_map(p.n_layer, p.n_head_kv, p.n_keep, 1.0f),
        head_map(p.n_layer, p.n_head_kv, p.n_keep),
    };
    parallel_for(p.n_layer, parts.n_threads, [&](int32_t il) {
        merge_layer(p, parts.cfg.pol.combine, il, in.layers[il].k, in.layers[il].v, in.rows, dst, in.state, after);
    });
    for (auto & layer : in.layers) {
        layer.store(dst.back() + 1);
    }
}

// everything else: rank j lives in row dst[j] now, at the position that plan.h gives it
void compressor::commit(llama_seq_id seq_id, const plan & p, const inputs & in, const std::vector<int32_t> & dst,
                        const cell_state & after) {
    struct cell {
        cell_place place;
        cell_kind  kind;
    };
    std::vector<cell> ranks;
    for (const int32_t i : rank_positions(p)) {
        ranks.push_back({ parts.kv.place(in.strm, in.rows[i]), parts.table.kind(in.strm, in.rows[i]) });
    }
    for (const int32_t row : in.rows) {
        parts.kv.free_row(in.strm, row);
        parts.reset_cell(in.strm, row, cell_kind::text);
    }
    for (size_t j = 0; j < dst.size(); ++j) {
        parts.kv.put(in.strm, dst[j], ranks[j].place, seq_id);
        parts.table.set_kind(in.strm, dst[j], ranks[j].kind);
    }
    parts.kv.search_from(in.strm, 0);

    cell_importance scores;
    scores.sum     = after.importance;
    scores.decayed = of_ranks(in.decayed, p, parts.cfg.pol.merges());
    parts.scores.scatter(in.strm, dst, scores);
    parts.table.set_counts(in.strm, dst, after.count);
    parts.table.set_rank_scores(in.strm, dst, p.rank_score);
    parts.bias.scatter(in.strm, dst, after.bias);
    parts.memory.freed(in.strm, dst);

    parts.end_prompt(seq_id);
    parts.seqs.note_change(seq_id, parts.kv.pos_max(seq_id), true);
    parts.seqs.at(seq_id).n_prompt_cells = parts.kv.n_cells(seq_id);
}

}  // namespace elastic
