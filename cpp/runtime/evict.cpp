#include "runtime/evict.h"

#include "core/generate.h"

#include <algorithm>
#include <cmath>

namespace elastic {

void cell_evictor::evict_one(llama_seq_id seq_id) {
    const auto & pol = parts.cfg.pol;

    choice from;
    from.strm       = parts.kv.stream(seq_id);
    from.rows       = parts.kv.rows(seq_id);
    from.rank_score = parts.table.rank_scores(from.strm, from.rows);
    for (const int32_t row : from.rows) {
        from.described.kind.push_back(parts.table.kind(from.strm, row));
        from.described.pinned.push_back(parts.kv.is_shared(from.strm, row));
    }
    if (pol.evicts_per_head()) {
        return evict_per_head(seq_id, from);
    }
    const int32_t n_prompt = parts.seqs.get(seq_id).n_prompt_cells;
    const int32_t i        = cell_to_evict(pol.generate, from.described, n_prompt, parts.cfg.offset, parts.cfg.n_sink, from.rank_score);
    if (i >= 0) {
        free_row(seq_id, from.strm, from.rows[i]);
    }
}

// the next token takes its place
void cell_evictor::free_row(llama_seq_id seq_id, uint32_t strm, int32_t row) {
    parts.kv.remove(strm, row, seq_id);
    parts.kv.search_from(strm, row);
    parts.stats.n_evictions++;
}

bool cell_evictor::held_by_all(uint32_t strm, int32_t row) const {
    for (int32_t il = 0; il < parts.kv.shape.n_layer; ++il) {
        if (parts.bias.is_masked(strm, row, il)) {
            return false;
        }
    }
    return true;
}

// Every head loses the cell of its own lowest score. The row that is freed is the newest of the candidates that all
// layers hold: a head that loses another cell keeps this one in the place of the lost.
void cell_evictor::evict_per_head(llama_seq_id seq_id, const choice & from) {
    std::vector<int32_t> candidates;
    for (const int32_t i : eviction_candidates(parts.cfg.pol.generate, from.described, parts.cfg.n_sink, from.rank_score)) {
        candidates.push_back(from.rows[i]);
    }
    if (candidates.empty()) {
        return;
    }
    const auto    newest = std::find_if(candidates.rbegin(), candidates.rend(), [&](int32_t row) { return held_by_all(from.strm, row); });
    const int32_t freed  = newest == candidates.rend() ? candidates.back() : *newest;
    const int64_t n_queries = std::max<int64_t>(1, parts.seqs.get(seq_id).n_tokens);
    std::vector<std::vector<int32_t>> lost(parts.kv.shape.n_layer);
    for (int32_t il = 0; il < parts.kv.shape.n_layer; ++il) {
        if (parts.bias.is_masked(from.strm, freed, il)) {
            mask_one(from.strm, il, candidates);
        } else {
            lost[il] = lost_in_layer(from.strm, il, candidates, n_queries);
        }
    }
    move_row(from.strm, freed, lost);
    free_row(seq_id, from.strm, freed);
}

// of each head the row of the lowest score
std::vector<int32_t> cell_evictor::lost_in_layer(uint32_t strm, int32_t il, const std::vector<int32_t> & candidates,
                                                 int64_t n_queries) const {
    const auto [lo, hi]     = std::minmax_element(candidates.begin(), candidates.end());
    const int32_t      base = *lo;
    std::vector<float> others(*hi - base + 1, HUGE_VALF);
    for (const int32_t row : candidates) {
        others[row - base] = parts.bias.is_masked(strm, row, il) ? HUGE_VALF : 0.0f;
    }
    const float          decay = parts.cfg.pol.decay();
    std::vector<int32_t> lost;
    for (int32_t ih = 0; ih < parts.kv.shape.n_head_kv; ++ih) {
        const float * sum     = parts.scores.sum_row(strm, il, ih) + base;
        const float * decayed = decay > 0.0f ? parts.scores.decayed_row(strm, il, ih) + base : nullptr;
        const auto    scores  = eviction_scores(others, sum, decayed, decay, n_queries);
        lost.push_back(first_lowest(scores, candidates, base));
    }
    return lost;
}

// Where the row that is freed is masked in a layer, one more is masked there: the one of least importance in all its heads.
void cell_evictor::mask_one(uint32_t strm, int32_t il, const std::vector<int32_t> & candidates) {
    int32_t best = -1;
    float   low  = 0.0f;
    for (const int32_t row : candidates) {
        float sum = 0.0f;
        for (int32_t ih = 0; ih < parts.kv.shape.n_head_kv; ++ih) {
            sum += parts.scores.sum_row(strm, il, ih)[row];
        }
        if (!parts.bias.is_masked(strm, row, il) && (best < 0 || sum < low)) {
            best = row;
            low  = sum;
        }
    }
    if (best >= 0) {
        parts.mask(strm, best, il);
    }
}

// row `from` of each layer, head by head to the rows of `to`
void cell_evictor::move_row(uint32_t strm, int32_t from, const std::vector<std::vector<int32_t>> & to) {
    moves.run(strm, from, to);
    for (int32_t il = 0; il < parts.kv.shape.n_layer; ++il) {
        for (int32_t ih = 0; ih < (int32_t) to[il].size(); ++ih) {
            if (to[il][ih] != from) {
                parts.move_head(strm, from, to[il][ih], il, ih);
            }
        }
    }
}

}  // namespace elastic
