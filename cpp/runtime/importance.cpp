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
    sums     = make(needs.sum, n_stream);
    decayed  = make(has_decayed(), n_stream);
    windowed = make(has_window(), n_stream);
    for (int32_t s = 0; has_window() && s < n_stream; ++s) {
        queries.push_back(make(true, needs.n_window));
    }
    last_query.assign(n_stream, 0);
    has_loaded.assign(n_stream, 0);
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

void importance::begin_query(uint32_t strm) {
    if (has_loaded[strm]) {
        windowed[strm].clear();  // what came with a saved state is older
        has_loaded[strm] = 0;
    }
    auto & i = last_query[strm];
    i        = (i + 1) % (int32_t) queries[strm].size();
    queries[strm][i].clear();
}

int32_t importance::query_index(uint32_t strm, int32_t ago) const {
    const int32_t n = (int32_t) queries[strm].size();
    return (last_query[strm] + n - ago) % n;
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

float * importance::query_row(uint32_t strm, int32_t ago, int32_t il, int32_t ih) {
    return queries[strm][query_index(strm, ago)].row(index(il, ih));
}

//
// cells
//

void importance::reset() {
    for (auto * all : { &sums, &decayed, &windowed }) {
        for (auto & m : *all) {
            m.clear();
        }
    }
    for (auto & ring : queries) {
        for (auto & m : ring) {
            m.clear();
        }
    }
    std::fill(has_loaded.begin(), has_loaded.end(), 0);
}

void importance::reset_rows(uint32_t strm, int32_t cell, int32_t first, int32_t n) {
    for (auto * all : { &sums, &decayed, &windowed }) {
        for (int32_t r = first; !all->empty() && r < first + n; ++r) {
            (*all)[strm].row(r)[cell] = 0.0f;
        }
    }
}

void importance::reset_cell(uint32_t strm, int32_t cell) {
    reset_rows(strm, cell, 0, n_rows());
    for (size_t q = 0; has_window() && q < queries[strm].size(); ++q) {
        for (int32_t r = 0; r < n_rows(); ++r) {
            queries[strm][q].row(r)[cell] = 0.0f;
        }
    }
}

void importance::reset_cell(uint32_t strm, int32_t cell, int32_t il) {
    reset_rows(strm, cell, index(il, 0), n_head_kv);
}

void importance::copy_stream(uint32_t strm_src, uint32_t strm_dst, int32_t n) {
    for (auto * all : { &sums, &decayed, &windowed }) {
        if (!all->empty()) {
            (*all)[strm_dst].copy_from((*all)[strm_src], n);
        }
    }
    for (size_t q = 0; has_window() && q < queries[strm_src].size(); ++q) {
        queries[strm_dst][q].copy_from(queries[strm_src][q], n);
    }
    last_query[strm_dst] = last_query[strm_src];
    has_loaded[strm_dst] = has_loaded[strm_src];
}

void importance::move_head(uint32_t strm, int32_t src, int32_t dst, int32_t il, int32_t ih) {
    for (auto * all : { &sums, &decayed, &windowed }) {
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
    if (has_window()) {
        res.windowed = take(windowed[strm], rows);
        for (const auto & query : queries[strm]) {
            const head_map one = take(query, rows);
            std::transform(one.data.begin(), one.data.end(), res.windowed.data.begin(), res.windowed.data.begin(), std::plus<>());
        }
    }
    return res;
}

void importance::scatter(uint32_t strm, const std::vector<int32_t> & rows, const cell_importance & values) {
    if (needs.sum && values.sum.n_cells > 0) {
        sums[strm].scatter(rows, values.sum);
    }
    if (has_decayed() && values.decayed.n_cells > 0) {
        decayed[strm].scatter(rows, values.decayed);
    }
    if (has_window() && values.windowed.n_cells > 0) {
        windowed[strm].scatter(rows, values.windowed);
        has_loaded[strm] = 1;
    }
}

cell_importance importance::gather_exact(uint32_t strm, const std::vector<int32_t> & rows) const {
    cell_importance res;
    res.sum      = needs.sum ? take(sums[strm], rows) : head_map(n_layer, n_head_kv, (int32_t) rows.size());
    res.decayed  = has_decayed() ? take(decayed[strm], rows) : head_map();
    res.windowed = has_window() ? take(windowed[strm], rows) : head_map();
    for (int32_t ago = 0; ago < needs.n_window; ++ago) {
        res.queries.push_back(take(queries[strm][query_index(strm, ago)], rows));
    }
    return res;
}

void importance::scatter_exact(uint32_t strm, const std::vector<int32_t> & rows, const cell_importance & values) {
    const auto & w = values.windowed.data;

    const uint8_t was_loaded = has_loaded[strm];
    scatter(strm, rows, values);
    has_loaded[strm] = was_loaded || std::any_of(w.begin(), w.end(), [](float x) { return x != 0.0f; });
    for (int32_t ago = 0; ago < (int32_t) values.queries.size(); ++ago) {
        queries[strm][query_index(strm, ago)].scatter(rows, values.queries[ago]);
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
