#include "runtime/cell_store.h"

#include "ggml-backend.h"
#include "llama-elastic.h"
#include "llama-kv-cache.h"
#include "runtime/pages.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <stdexcept>

namespace elastic {

cell_store::cell_store(const llama_kv_cache & kv, const kv_shape & shape, const config & cfg, float bias_scale)
    : shape(shape), scale(bias_scale) {
    const auto make = [&] {
        std::vector<lazy_map> res;
        for (int32_t i = 0; i < shape.n_stream; ++i) {
            res.emplace_back(n_rows(), shape.kv_size);
        }
        return res;
    };

    if (cfg.has_sum()) {
        mass = make();
    }
    if (cfg.pol.needs_counts()) {
        extra = make();
    }
    if (cfg.decay() > 0.0f) {
        fading = make();
    }
    if (cfg.n_window() > 0) {
        windowed = make();
        for (int32_t s = 0; s < shape.n_stream; ++s) {
            queries.emplace_back();
            for (int32_t i = 0; i < cfg.n_window(); ++i) {
                queries[s].emplace_back(n_rows(), shape.kv_size);
            }
        }
        last_query.assign(shape.n_stream, 0);
        has_loaded.assign(shape.n_stream, 0);
    }

    kinds.assign(shape.n_stream, std::vector<cell_kind>(shape.kv_size, cell_kind::text));
    totals.assign(shape.n_stream, std::vector<float>(shape.kv_size, HUGE_VALF));
    biased.assign(shape.n_stream, std::vector<uint8_t>(shape.kv_size, 0));

    if (!cfg.pol.needs_bias()) {
        return;
    }
    bias = make();

    // beside the keys of its layer, so that no graph has to move it between devices
    std::map<ggml_backend_buffer_type_t, std::vector<int32_t>> layers_of;
    for (int32_t i = 0; i < shape.n_layer; ++i) {
        layers_of[ggml_backend_buffer_get_type(kv.get_k_storage(shape.layer_ids[i])->buffer)].push_back(i);
    }

    bias_tensors.resize(shape.n_layer);
    for (const auto & [buft, layers] : layers_of) {
        ggml_init_params params = { layers.size() * ggml_tensor_overhead(), nullptr, true };
        ggml_context_ptr ctx(ggml_init(params));
        for (const int32_t i : layers) {
            bias_tensors[i] = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, shape.kv_size, shape.n_head_kv, shape.n_stream);
        }
        ggml_backend_buffer_ptr buf(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft));
        if (!buf) {
            throw std::runtime_error("[elastic_attach] failed to allocate the attention bias");
        }
        clear_lazily(buf.get());
        ctxs.push_back(std::move(ctx));
        bufs.push_back(std::move(buf));
    }
}

void cell_store::set_biased(uint32_t strm, int32_t cell, bool value) {
    n_biased += (int64_t) value - (int64_t) biased[strm][cell];
    biased[strm][cell] = value;
}

void cell_store::reset_cell(uint32_t strm, int32_t cell, cell_kind kind) {
    kinds[strm][cell]  = kind;
    totals[strm][cell] = HUGE_VALF;

    for (int32_t r = 0; r < n_rows(); ++r) {
        for (auto * maps : { &mass, &extra, &fading, &windowed }) {
            if (!maps->empty()) {
                (*maps)[strm].row(r)[cell] = 0.0f;
            }
        }
        if (biased[strm][cell]) {
            bias[strm].row(r)[cell] = 0.0f;
        }
        for (size_t q = 0; !queries.empty() && q < queries[strm].size(); ++q) {
            queries[strm][q].row(r)[cell] = 0.0f;
        }
    }

    if (biased[strm][cell]) {
        set_biased(strm, cell, false);
        upload_bias(strm, cell, cell + 1);
    }
}

void cell_store::reset() {
    for (auto * maps : { &mass, &extra, &bias, &fading, &windowed }) {
        for (auto & m : *maps) {
            m.clear();
        }
    }
    for (auto & ring : queries) {
        for (auto & m : ring) {
            m.clear();
        }
    }
    std::fill(has_loaded.begin(), has_loaded.end(), 0);
    for (int32_t s = 0; s < shape.n_stream; ++s) {
        std::fill(totals[s].begin(), totals[s].end(), HUGE_VALF);
        std::fill(biased[s].begin(), biased[s].end(), 0);
    }
    for (auto & buf : bufs) {
        clear_lazily(buf.get());
    }
    n_biased    = 0;
    some_absent = false;
}

void cell_store::copy_stream(uint32_t strm_src, uint32_t strm_dst, int32_t n) {
    for (auto * maps : { &mass, &extra, &bias, &fading, &windowed }) {
        if (!maps->empty()) {
            (*maps)[strm_dst].copy_from((*maps)[strm_src], n);
        }
    }
    if (has_window()) {
        for (size_t q = 0; q < queries[strm_src].size(); ++q) {
            queries[strm_dst][q].copy_from(queries[strm_src][q], n);
        }
        last_query[strm_dst] = last_query[strm_src];
        has_loaded[strm_dst] = has_loaded[strm_src];
    }
    kinds[strm_dst]  = kinds[strm_src];
    totals[strm_dst] = totals[strm_src];
    // beyond n, flags go on to say what the destination holds
    for (int32_t i = 0; i < n; ++i) {
        set_biased(strm_dst, i, biased[strm_src][i] != 0);
    }
    if (has_bias_map()) {
        upload_bias(strm_dst, 0, n);
    }
}

head_map cell_store::take(const std::vector<lazy_map> & from, uint32_t strm, const std::vector<int32_t> & rows, float shift) const {
    const int32_t n = (int32_t) rows.size();
    head_map      res(shape.n_layer, shape.n_head_kv, n, shift);
    for (int32_t r = 0; !from.empty() && r < n_rows(); ++r) {
        const float * src = from[strm].row(r);
        float *       dst = res.data.data() + (size_t) r * n;
        for (int32_t i = 0; i < n; ++i) {
            dst[i] += src[rows[i]];
        }
    }
    return res;
}

void cell_store::put(std::vector<lazy_map> & to, uint32_t strm, const std::vector<int32_t> & rows, const head_map & from,
                     float shift) const {
    for (int32_t r = 0; !to.empty() && r < n_rows(); ++r) {
        const float * src = from.data.data() + (size_t) r * rows.size();
        float *       dst = to[strm].row(r);
        for (size_t i = 0; i < rows.size(); ++i) {
            dst[rows[i]] = src[i] + shift;
        }
    }
}

cell_state cell_store::gather(uint32_t strm, const std::vector<int32_t> & rows) const {
    return { take(mass, strm, rows), take(extra, strm, rows, 1.0f), take(bias, strm, rows) };
}

head_map cell_store::gather_fading(uint32_t strm, const std::vector<int32_t> & rows) const {
    return has_fading() ? take(fading, strm, rows) : head_map();
}

head_map cell_store::gather_window(uint32_t strm, const std::vector<int32_t> & rows) const {
    if (!has_window()) {
        return {};
    }
    head_map res = take(windowed, strm, rows);
    for (const auto & q : queries[strm]) {
        for (int32_t r = 0; r < n_rows(); ++r) {
            for (size_t i = 0; i < rows.size(); ++i) {
                res.data[r * rows.size() + i] += q.row(r)[rows[i]];
            }
        }
    }
    return res;
}

void cell_store::scatter_fading(uint32_t strm, const std::vector<int32_t> & rows, const head_map & m) {
    put(fading, strm, rows, m);
}

void cell_store::scatter_window(uint32_t strm, const std::vector<int32_t> & rows, const head_map & m) {
    put(windowed, strm, rows, m);
    if (has_window()) {
        has_loaded[strm] = 1;
    }
}

void cell_store::scatter(uint32_t strm, const std::vector<int32_t> & rows, const cell_state & state) {
    put(mass, strm, rows, state.mass);
    put(extra, strm, rows, state.count, -1.0f);
    put(bias, strm, rows, state.bias);

    if (!has_bias_map() || rows.empty()) {
        return;
    }
    for (size_t i = 0; i < rows.size(); ++i) {
        bool any = false;
        for (int32_t r = 0; r < n_rows() && !any; ++r) {
            any = state.bias.data[(size_t) r * rows.size() + i] != 0.0f;
        }
        set_biased(strm, rows[i], any);
    }
    some_absent |= std::find(state.bias.data.begin(), state.bias.data.end(), absent_bias) != state.bias.data.end();
    const auto [lo, hi] = std::minmax_element(rows.begin(), rows.end());
    upload_bias(strm, *lo, *hi + 1);
}

cell_scores cell_store::gather_scores(uint32_t strm, const std::vector<int32_t> & rows) const {
    cell_scores res;
    res.state    = gather(strm, rows);
    res.fading   = gather_fading(strm, rows);
    res.windowed = has_window() ? take(windowed, strm, rows) : head_map();
    for (int32_t ago = 0; has_window() && ago < (int32_t) queries[strm].size(); ++ago) {
        head_map m(shape.n_layer, shape.n_head_kv, (int32_t) rows.size());
        for (int32_t r = 0; r < n_rows(); ++r) {
            const float * src = queries[strm][query_index(strm, ago)].row(r);
            std::transform(rows.begin(), rows.end(), m.data.begin() + (size_t) r * rows.size(), [&](int32_t row) { return src[row]; });
        }
        res.queries.push_back(std::move(m));
    }
    for (const int32_t row : rows) {
        res.totals.push_back(total(strm, row));
    }
    return res;
}

void cell_store::scatter_scores(uint32_t strm, const std::vector<int32_t> & rows, const cell_scores & scores) {
    scatter(strm, rows, scores.state);
    set_totals(strm, rows, scores.totals);
    put(fading, strm, rows, scores.fading);
    put(windowed, strm, rows, scores.windowed);
    for (int32_t ago = 0; ago < (int32_t) scores.queries.size(); ++ago) {
        for (int32_t r = 0; r < n_rows(); ++r) {
            const float * src = scores.queries[ago].data.data() + (size_t) r * rows.size();
            float *       dst = queries[strm][query_index(strm, ago)].row(r);
            for (size_t i = 0; i < rows.size(); ++i) {
                dst[rows[i]] = src[i];
            }
        }
    }
    const auto & w = scores.windowed.data;
    if (has_window() && std::any_of(w.begin(), w.end(), [](float x) { return x != 0.0f; })) {
        has_loaded[strm] = 1;
    }
}

void cell_store::set_totals(uint32_t strm, const std::vector<int32_t> & rows, const std::vector<float> & values) {
    for (size_t i = 0; i < rows.size(); ++i) {
        totals[strm][rows[i]] = values[i];
    }
}

std::vector<float> cell_store::sum_mass(uint32_t strm, const std::vector<int32_t> & rows) const {
    std::vector<float> res(rows.size(), 0.0f);
    for (int32_t r = 0; has_mass() && r < n_rows(); ++r) {
        const float * src = mass[strm].row(r);
        for (size_t i = 0; i < rows.size(); ++i) {
            res[i] += src[rows[i]];
        }
    }
    return res;
}

void cell_store::rate_image_cells(uint32_t strm, const std::vector<int32_t> & rows) {
    std::vector<int32_t> image;
    for (const int32_t row : rows) {
        if (kinds[strm][row] == cell_kind::image) {
            image.push_back(row);
        }
    }
    set_totals(strm, image, sum_mass(strm, image));
}

void cell_store::begin_query(uint32_t strm) {
    if (has_loaded[strm]) {
        windowed[strm].clear();  // what came with a saved state is older
        has_loaded[strm] = 0;
    }
    auto & i = last_query[strm];
    i        = (i + 1) % (int32_t) queries[strm].size();
    queries[strm][i].clear();
}

int32_t cell_store::query_index(uint32_t strm, int32_t ago) const {
    const int32_t n = (int32_t) queries[strm].size();
    return (last_query[strm] + n - ago) % n;
}

float * cell_store::query_row(uint32_t strm, int32_t ago, int32_t il, int32_t ih) {
    return queries[strm][query_index(strm, ago)].row(index(il, ih));
}

void cell_store::set_bias(uint32_t strm, int32_t cell, int32_t il, int32_t ih, float value) {
    float & x = bias[strm].row(index(il, ih))[cell];
    if (x == value) {
        return;
    }
    x = value;
    if (value != 0.0f) {
        set_biased(strm, cell, true);
    }
    const float   scaled = value * (1.0f / scale);
    ggml_tensor * t      = bias_tensors[il];
    ggml_backend_tensor_set(t, &scaled, strm * t->nb[2] + ih * t->nb[1] + cell * sizeof(float), sizeof(float));
}

void cell_store::make_absent(uint32_t strm, int32_t cell, int32_t il) {
    for (int32_t ih = 0; ih < shape.n_head_kv; ++ih) {
        for (auto * maps : { &mass, &extra, &fading, &windowed }) {
            if (!maps->empty()) {
                (*maps)[strm].row(index(il, ih))[cell] = 0.0f;
            }
        }
        set_bias(strm, cell, il, ih, absent_bias);
    }
    some_absent = true;
}

void cell_store::move_head(uint32_t strm, int32_t src, int32_t dst, int32_t il, int32_t ih) {
    for (auto * maps : { &mass, &extra, &fading, &windowed }) {
        if (!maps->empty()) {
            float * row = (*maps)[strm].row(index(il, ih));
            row[dst]    = row[src];
        }
    }
    if (has_bias_map()) {
        set_bias(strm, dst, il, ih, bias[strm].row(index(il, ih))[src]);
    }
}

float * cell_store::fading_row(uint32_t strm, int32_t il, int32_t ih) {
    return has_fading() ? fading[strm].row(index(il, ih)) : nullptr;
}

float * cell_store::mass_row(uint32_t strm, int32_t il, int32_t ih) {
    return has_mass() ? mass[strm].row(index(il, ih)) : nullptr;
}

ggml_tensor * cell_store::bias_tensor(int32_t il_model) const {
    const int32_t il = shape.index_of(il_model);
    return il < 0 ? nullptr : bias_tensors[il];
}

int64_t cell_store::bias_bytes_per_cell() const {
    return has_bias_map() ? (int64_t) shape.n_layer * shape.n_head_kv * (int64_t) sizeof(float) : 0;
}

void cell_store::upload_bias(uint32_t strm, int32_t cell_min, int32_t cell_max) {
    std::vector<float> scaled(cell_max - cell_min);
    for (int32_t il = 0; il < shape.n_layer; ++il) {
        ggml_tensor * t = bias_tensors[il];
        for (int32_t ih = 0; ih < shape.n_head_kv; ++ih) {
            const float * row = bias[strm].row(index(il, ih)) + cell_min;
            std::transform(row, row + scaled.size(), scaled.begin(), [&](float x) { return x * (1.0f / scale); });
            ggml_backend_tensor_set(t, scaled.data(), strm * t->nb[2] + ih * t->nb[1] + cell_min * sizeof(float),
                                    scaled.size() * sizeof(float));
        }
    }
}

}  // namespace elastic
