#include "runtime/cell_table.h"

#include <algorithm>

namespace elastic {

cell_table::cell_table(int32_t n_layer, int32_t n_head_kv, int32_t kv_size, int32_t n_stream, bool counts)
    : n_layer(n_layer), n_head_kv(n_head_kv), kinds(n_stream, std::vector<cell_kind>(kv_size, cell_kind::text)),
      scores(n_stream, std::vector<float>(kv_size, HUGE_VALF)) {
    for (int32_t s = 0; counts && s < n_stream; ++s) {
        merged.emplace_back(n_layer * n_head_kv, kv_size);
    }
}

std::vector<float> cell_table::rank_scores(uint32_t strm, const std::vector<int32_t> & rows) const {
    std::vector<float> res;
    for (const int32_t row : rows) {
        res.push_back(rank_score(strm, row));
    }
    return res;
}

void cell_table::set_rank_scores(uint32_t strm, const std::vector<int32_t> & rows, const std::vector<float> & values) {
    for (size_t i = 0; i < rows.size(); ++i) {
        scores[strm][rows[i]] = values[i];
    }
}

head_map cell_table::counts(uint32_t strm, const std::vector<int32_t> & rows) const {
    head_map res(n_layer, n_head_kv, (int32_t) rows.size(), 1.0f);
    if (has_counts()) {
        merged[strm].gather(rows, res);
        std::transform(res.data.begin(), res.data.end(), res.data.begin(), [](float x) { return 1.0f + x; });
    }
    return res;
}

void cell_table::set_counts(uint32_t strm, const std::vector<int32_t> & rows, head_map values) {
    if (has_counts()) {
        std::transform(values.data.begin(), values.data.end(), values.data.begin(), [](float x) { return x - 1.0f; });
        merged[strm].scatter(rows, values);
    }
}

void cell_table::reset() {
    for (auto & of_stream : scores) {
        std::fill(of_stream.begin(), of_stream.end(), HUGE_VALF);
    }
    for (auto & m : merged) {
        m.clear();
    }
}

void cell_table::reset_cell(uint32_t strm, int32_t cell, cell_kind kind) {
    kinds[strm][cell]  = kind;
    scores[strm][cell] = HUGE_VALF;
    for (int32_t il = 0; has_counts() && il < n_layer; ++il) {
        reset_counts(strm, cell, il);
    }
}

void cell_table::reset_counts(uint32_t strm, int32_t cell, int32_t il) {
    for (int32_t ih = 0; has_counts() && ih < n_head_kv; ++ih) {
        merged[strm].row(il * n_head_kv + ih)[cell] = 0.0f;
    }
}

void cell_table::copy_stream(uint32_t strm_src, uint32_t strm_dst, int32_t n) {
    kinds[strm_dst]  = kinds[strm_src];
    scores[strm_dst] = scores[strm_src];
    if (has_counts()) {
        merged[strm_dst].copy_from(merged[strm_src], n);
    }
}

void cell_table::move_head(uint32_t strm, int32_t src, int32_t dst, int32_t il, int32_t ih) {
    if (has_counts()) {
        float * row = merged[strm].row(il * n_head_kv + ih);
        row[dst]    = row[src];
    }
}

}  // namespace elastic
