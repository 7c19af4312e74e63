#include "core/select.h"

#include "kernels/parallel.h"

#include <algorithm>
#include <cmath>

namespace elastic {

namespace {

// the kept cells of a run, as indices in it, in the order of its ranks; the tail's may stand anywhere
std::vector<int32_t> rank_order(const run & r, bool ranked, const float * score, std::vector<int32_t> kept) {
    const auto higher = [&](int32_t a, int32_t b) {
        const float x = score[r.cells[a]], y = score[r.cells[b]];
        return x != y ? x > y : a < b;
    };
    if (ranked) {
        std::sort(kept.begin() + r.n_leading(), kept.end(), higher);
    }
    return kept;
}

void select_run(const selector & s, const layout & l, size_t index, const run & r, const float * score, head_rows & rows, int32_t * kept,
                int32_t * nearest) {
    choice found;
    if (r.whole()) {
        for (int32_t i = 0; i < (int32_t) r.cells.size(); ++i) {
            found.kept.push_back(i);
        }
    } else {
        found = s.choose(r, score, rows);
    }
    const auto & ranks = l.ranks[index];
    int32_t      next  = ranks.first;
    for (const int32_t i : rank_order(r, l.ranked, score, std::move(found.kept))) {
        const int32_t last = ranks.tail_rank(r.cells[i]);

        kept[last >= 0 ? last : next++] = r.cells[i];
    }
    for (size_t i = 0; nearest && i < found.nearest.size(); ++i) {
        nearest[r.cells[i]] = found.nearest[i] < 0 ? -1 : r.cells[found.nearest[i]];
    }
}

}  // namespace

neighbours select_cells(const selector & s, const layout & l, const head_map & score, const row_source * rows, plan & p,
                        int32_t n_threads) {
    const bool needs_rows = s.needs().rows;
    const bool finds      = s.finds_neighbours();
    p.kept.assign((size_t) p.n_layer * p.n_head_kv * p.n_keep, -1);
    neighbours nearest((size_t) p.n_layer * p.n_head_kv * (finds ? p.n_cells : 0), -1);

    parallel_for(p.n_layer * p.n_head_kv, n_threads, [&](int32_t head) {
        const int32_t il = head / p.n_head_kv;
        const int32_t ih = head % p.n_head_kv;
        head_rows     own;
        if (needs_rows) {
            own.load(*rows, il, ih, p.n_cells);
        }
        for (size_t r = 0; r < l.runs.size(); ++r) {
            select_run(s, l, r, l.of_layers[r][il], score.row(il, ih), own, p.kept.data() + (size_t) head * p.n_keep,
                       finds ? nearest.data() + (size_t) head * p.n_cells : nullptr);
        }
    });
    return nearest;
}

void sum_rank_scores(const layout & l, const head_map & score, plan & p) {
    p.rank_score.assign(p.n_keep, 0.0f);

    std::vector<uint8_t> never = l.protect.stay;
    for (const auto & r : l.runs) {
        for (const int32_t i : r.cells) {
            never[i] |= !r.image && r.whole();
        }
    }
    for (int32_t il = 0; il < p.n_layer; ++il) {
        for (int32_t ih = 0; ih < p.n_head_kv; ++ih) {
            const int32_t * kept = p.kept_row(il, ih);
            const float *   src  = score.row(il, ih);
            for (int32_t j = 0; j < p.n_keep; ++j) {
                if (kept[j] >= 0) {
                    p.rank_score[j] = never[kept[j]] ? HUGE_VALF : p.rank_score[j] + src[kept[j]];
                }
            }
        }
    }
}

}  // namespace elastic
