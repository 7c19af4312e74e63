#include "runtime/importance.h"

#include <algorithm>

namespace elastic {

importance::importance(int32_t n_layer, int32_t n_head_kv, int32_t kv_size, int32_t n_stream, const importance_needs & needs)
    : needs(needs), n_layer(n_layer), n_head_kv(n_head_kv) {
    const auto make = [&](bool wanted, int32_t n) {
        maps res;
        for (int32_t i = 0; wanted && i < n; ++i) {
            res.emplace_back(n_rows(), kv_size);
        }
        return res;
    };
    sums    = make(needs.sum, n_stream);
    decayed = make(has_decayed(), n_stream);
}

//
// adding
//

void importance::decay(uint32_t strm, const std::vector<float> & factor) {
    for (int32_t r = 0; r < n_rows(); ++r) {
        float * row = decayed[strm].row(r);
        for (size_t i = 0; i < factor.size(); ++i) {
            row[i] *= factor[i];
        }
    }
}

float * importance::sum_row(uint32_t strm, int32_t il, int32_t ih) {
    return needs.sum ? sums[strm].row(index(il, ih)) : nullptr;
}

const float * importance::sum_row(uint32_t strm, int32_t il, int32_t ih) const {
    return needs.sum ? sums[strm].row(index(il, ih)) : nullptr;
}

float * importance::decayed_row(uint32_t strm, int32_t il, int32_t ih) {
    return has_decayed() ? decayed[strm].row(index(il, ih)) : nullptr;
}

//
// cells
//

void importance::reset() {
    for (auto * all : { &sums, &decayed }) {
        for (auto & m : *all) {
            m.clear();
        }
    }
}

void importance::reset_rows(uint32_t strm, int32_t cell, int32_t first, int32_t n) {
    for (auto * all : { &sums, &decayed }) {
        for (int32_t r = first; !all->empty() && r < first + n; ++r) {
            (*all)[strm].row(r)[cell] = 0.0f;
        }
    }
}

void importance::reset_cell(uint32_t strm, int32_t cell) {
    reset_rows(strm, cell, 0, n_rows());
}

void importance::reset_cell(uint32_t strm, int32_t cell, int32_t il) {
    reset_rows(strm, cell, index(il, 0), n_head_kv);
}

void importance::copy_stream(uint32_t strm_src, uint32_t strm_dst, int32_t n) {
    for (auto * all : { &sums, &decayed }) {
        if (!all->empty()) {
            (*all)[strm_dst].copy_from((*all)[strm_src], n);
        }
    }
}

void importance::move_head(uint32_t strm, int32_t src, int32_t dst, int32_t il, int32_t ih) {
    for (auto * all : { &sums, &decayed }) {
        if (!all->empty()) {
            float * row = (*all)[strm].row(index(il, ih));
            row[dst]    = row[src];
        }
    }
}

head_map importance::take(const lazy_map & from, const std::vector<int32_t> & rows) const {
    head_map res(n_layer, n_head_kv, (int32_t) rows.size());
    from.gather(rows, res);
    return res;
}

cell_importance importance::gather(uint32_t strm, const std::vector<int32_t> & rows) const {
    cell_importance res;
    res.sum     = needs.sum ? take(sums[strm], rows) : head_map(n_layer, n_head_kv, (int32_t) rows.size());
    res.decayed = has_decayed() ? take(decayed[strm], rows) : head_map();
    return res;
}

void importance::scatter(uint32_t strm, const std::vector<int32_t> & rows, const cell_importance & values) {
    if (needs.sum && values.sum.n_cells > 0) {
        sums[strm].scatter(rows, values.sum);
    }
    if (has_decayed() && values.decayed.n_cells > 0) {
        decayed[strm].scatter(rows, values.decayed);
    }
}

std::vector<float> importance::total(uint32_t strm, const std::vector<int32_t> & rows) const {
    std::vector<float> res(rows.size(), 0.0f);
    for (int32_t r = 0; needs.sum && r < n_rows(); ++r) {
        const float * src = sums[strm].row(r);
        for (size_t i = 0; i < rows.size(); ++i) {
            res[i] += src[rows[i]];
        }
    }
    return res;
}

}  // namespace elastic
