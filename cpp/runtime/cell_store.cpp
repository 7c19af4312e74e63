#include "runtime/cell_store.h"

#include "ggml-backend.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <stdexcept>

namespace elastic {

cell_store::cell_store(const llama_kv_cache & kv, const kv_shape & shape, const config & cfg) : shape(shape) {
    const auto make = [&](float fill) {
        return std::vector<head_map>(shape.n_stream, head_map(shape.n_layer, shape.n_head_kv, shape.kv_size, fill));
    };

    if (cfg.has_sum()) {
        mass = make(0.0f);
    }
    if (cfg.pol.combine == combine_rule::nearest_mean) {
        count = make(1.0f);
    }

    if (cfg.decay() > 0.0f) {
        fading = make(0.0f);
    }
    if (cfg.n_window() > 0) {
        windowed = make(0.0f);
        queries.assign(shape.n_stream, std::vector<head_map>(cfg.n_window(), head_map(shape.n_layer, shape.n_head_kv, shape.kv_size)));
        last_query.assign(shape.n_stream, 0);
    }

    kinds.assign(shape.n_stream, std::vector<cell_kind>(shape.kv_size, cell_kind::text));
    totals.assign(shape.n_stream, std::vector<float>(shape.kv_size, HUGE_VALF));
    biased.assign(shape.n_stream, std::vector<uint8_t>(shape.kv_size, 0));

    if (!cfg.pol.needs_bias()) {
        return;
    }
    bias = make(0.0f);

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
        ggml_backend_buffer_clear(buf.get(), 0);
        ctxs.push_back(std::move(ctx));
        bufs.push_back(std::move(buf));
    }
}

static std::vector<head_map> no_queries;

static void fill(std::vector<head_map> & maps, float value) {
    for (auto & m : maps) {
        std::fill(m.data.begin(), m.data.end(), value);
    }
}

void cell_store::set_biased(uint32_t strm, int32_t cell, bool value) {
    n_biased += (int64_t) value - (int64_t) biased[strm][cell];
    biased[strm][cell] = value;
}

void cell_store::reset_cell(uint32_t strm, int32_t cell, cell_kind kind) {
    kinds[strm][cell]  = kind;
    totals[strm][cell] = HUGE_VALF;

    for (int32_t il = 0; il < shape.n_layer; ++il) {
        for (int32_t ih = 0; ih < shape.n_head_kv; ++ih) {
            if (has_mass()) {
                mass[strm].row(il, ih)[cell] = 0.0f;
            }
            if (has_fading()) {
                fading[strm].row(il, ih)[cell] = 0.0f;
            }
            if (has_window()) {
                windowed[strm].row(il, ih)[cell] = 0.0f;
            }
            if (has_count()) {
                count[strm].row(il, ih)[cell] = 1.0f;
            }
            if (biased[strm][cell]) {
                bias[strm].row(il, ih)[cell] = 0.0f;
            }
        }
    }

    for (auto & m : queries.empty() ? no_queries : queries[strm]) {
        for (int32_t r = 0; r < shape.n_layer * shape.n_head_kv; ++r) {
            m.data[(size_t) r * shape.kv_size + cell] = 0.0f;
        }
    }

    if (biased[strm][cell]) {
        set_biased(strm, cell, false);
        upload_bias(strm, cell, cell + 1);
    }
}

void cell_store::reset() {
    fill(mass, 0.0f);
    fill(fading, 0.0f);
    fill(windowed, 0.0f);
    fill(count, 1.0f);
    fill(bias, 0.0f);
    for (auto & ring : queries) {
        fill(ring, 0.0f);
    }
    for (int32_t s = 0; s < shape.n_stream; ++s) {
        std::fill(totals[s].begin(), totals[s].end(), HUGE_VALF);
        std::fill(biased[s].begin(), biased[s].end(), 0);
    }
    for (auto & buf : bufs) {
        ggml_backend_buffer_clear(buf.get(), 0);
    }
    n_biased = 0;
}

void cell_store::copy_stream(uint32_t strm_src, uint32_t strm_dst) {
    if (has_mass()) {
        mass[strm_dst] = mass[strm_src];
    }
    if (has_count()) {
        count[strm_dst] = count[strm_src];
    }
    if (has_fading()) {
        fading[strm_dst] = fading[strm_src];
    }
    if (has_window()) {
        windowed[strm_dst]   = windowed[strm_src];
        queries[strm_dst]    = queries[strm_src];
        last_query[strm_dst] = last_query[strm_src];
    }
    kinds[strm_dst]  = kinds[strm_src];
    totals[strm_dst] = totals[strm_src];
    for (int32_t i = 0; i < shape.kv_size; ++i) {
        set_biased(strm_dst, i, biased[strm_src][i] != 0);
    }
    if (has_bias_map()) {
        bias[strm_dst] = bias[strm_src];
        upload_bias(strm_dst, 0, shape.kv_size);
    }
}

head_map cell_store::take(const std::vector<head_map> & from, uint32_t strm, const std::vector<int32_t> & rows, float fill) const {
    const int32_t n = (int32_t) rows.size();
    head_map      res(shape.n_layer, shape.n_head_kv, n, fill);
    if (from.empty()) {
        return res;
    }
    for (int32_t il = 0; il < shape.n_layer; ++il) {
        for (int32_t ih = 0; ih < shape.n_head_kv; ++ih) {
            const float * src = from[strm].row(il, ih);
            float *       dst = res.row(il, ih);
            for (int32_t i = 0; i < n; ++i) {
                dst[i] = src[rows[i]];
            }
        }
    }
    return res;
}

void cell_store::put(std::vector<head_map> & to, uint32_t strm, const std::vector<int32_t> & rows, const head_map & from) const {
    if (to.empty()) {
        return;
    }
    for (int32_t il = 0; il < shape.n_layer; ++il) {
        for (int32_t ih = 0; ih < shape.n_head_kv; ++ih) {
            const float * src = from.row(il, ih);
            float *       dst = to[strm].row(il, ih);
            for (size_t i = 0; i < rows.size(); ++i) {
                dst[rows[i]] = src[i];
            }
        }
    }
}

cell_state cell_store::gather(uint32_t strm, const std::vector<int32_t> & rows) const {
    return { take(mass, strm, rows, 0.0f), take(count, strm, rows, 1.0f), take(bias, strm, rows, 0.0f) };
}

head_map cell_store::gather_fading(uint32_t strm, const std::vector<int32_t> & rows) const {
    return has_fading() ? take(fading, strm, rows, 0.0f) : head_map();
}

head_map cell_store::gather_window(uint32_t strm, const std::vector<int32_t> & rows) const {
    if (!has_window()) {
        return {};
    }
    head_map res = take(windowed, strm, rows, 0.0f);
    for (const auto & q : queries[strm]) {
        for (int32_t r = 0; r < shape.n_layer * shape.n_head_kv; ++r) {
            for (size_t i = 0; i < rows.size(); ++i) {
                res.data[r * rows.size() + i] += q.data[(size_t) r * shape.kv_size + rows[i]];
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
}

void cell_store::scatter(uint32_t strm, const std::vector<int32_t> & rows, const cell_state & state) {
    put(mass, strm, rows, state.mass);
    put(count, strm, rows, state.count);
    put(bias, strm, rows, state.bias);

    if (!has_bias_map() || rows.empty()) {
        return;
    }
    for (size_t i = 0; i < rows.size(); ++i) {
        bool any = false;
        for (int32_t r = 0; r < shape.n_layer * shape.n_head_kv && !any; ++r) {
            any = state.bias.data[(size_t) r * rows.size() + i] != 0.0f;
        }
        set_biased(strm, rows[i], any);
    }
    const auto [lo, hi] = std::minmax_element(rows.begin(), rows.end());
    upload_bias(strm, *lo, *hi + 1);
}

void cell_store::set_totals(uint32_t strm, const std::vector<int32_t> & rows, const std::vector<float> & values) {
    for (size_t i = 0; i < rows.size(); ++i) {
        totals[strm][rows[i]] = values[i];
    }
}

std::vector<float> cell_store::sum_mass(uint32_t strm, const std::vector<int32_t> & rows) const {
    std::vector<float> res(rows.size(), 0.0f);
    for (int32_t r = 0; has_mass() && r < shape.n_layer * shape.n_head_kv; ++r) {
        const float * src = mass[strm].data.data() + (size_t) r * shape.kv_size;
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
    auto & old = windowed[strm].data;
    if (std::any_of(old.begin(), old.end(), [](float x) { return x != 0.0f; })) {
        std::fill(old.begin(), old.end(), 0.0f);  // what came with a saved state is older
    }
    auto & i = last_query[strm];
    i        = (i + 1) % (int32_t) queries[strm].size();
    auto & m = queries[strm][i];
    std::fill(m.data.begin(), m.data.end(), 0.0f);
}

float * cell_store::query_row(uint32_t strm, int32_t ago, int32_t il, int32_t ih) {
    const int32_t n = (int32_t) queries[strm].size();
    return queries[strm][(last_query[strm] + n - ago) % n].row(il, ih);
}

void cell_store::set_bias(uint32_t strm, int32_t cell, int32_t il, int32_t ih, float value) {
    float & x = bias[strm].row(il, ih)[cell];
    if (x == value) {
        return;
    }
    x = value;
    if (value != 0.0f) {
        set_biased(strm, cell, true);
    }
    ggml_tensor * t = bias_tensors[il];
    ggml_backend_tensor_set(t, &x, strm * t->nb[2] + ih * t->nb[1] + cell * sizeof(float), sizeof(float));
}

void cell_store::move_head(uint32_t strm, int32_t src, int32_t dst, int32_t il, int32_t ih) {
    for (auto * maps : { &mass, &count, &fading, &windowed }) {
        if (!maps->empty()) {
            float * row = (*maps)[strm].row(il, ih);
            row[dst]    = row[src];
        }
    }
    if (has_bias_map()) {
        set_bias(strm, dst, il, ih, bias[strm].row(il, ih)[src]);
    }
}

float * cell_store::fading_row(uint32_t strm, int32_t il, int32_t ih) {
    return has_fading() ? fading[strm].row(il, ih) : nullptr;
}

float * cell_store::mass_row(uint32_t strm, int32_t il, int32_t ih) {
    return has_mass() ? mass[strm].row(il, ih) : nullptr;
}

ggml_tensor * cell_store::bias_tensor(int32_t il_model) const {
    const int32_t il = shape.index_of(il_model);
    return il < 0 ? nullptr : bias_tensors[il];
}

int64_t cell_store::bias_bytes_per_cell() const {
    return has_bias_map() ? (int64_t) shape.n_layer * shape.n_head_kv * (int64_t) sizeof(float) : 0;
}

void cell_store::upload_bias(uint32_t strm, int32_t cell_min, int32_t cell_max) {
    for (int32_t il = 0; il < shape.n_layer; ++il) {
        ggml_tensor * t = bias_tensors[il];
        for (int32_t ih = 0; ih < shape.n_head_kv; ++ih) {
            ggml_backend_tensor_set(t, bias[strm].row(il, ih) + cell_min, strm * t->nb[2] + ih * t->nb[1] + cell_min * sizeof(float),
                                    (cell_max - cell_min) * sizeof(float));
        }
    }
}

}  // namespace elastic
