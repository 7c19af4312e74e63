#include "runtime/cell_store.h"

#include "ggml-backend.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <map>
#include <stdexcept>

namespace elastic {

cell_store::cell_store(const llama_kv_cache & kv, const kv_shape & shape, const policy & pol) : shape(shape) {
    const auto make = [&](float fill) {
        return std::vector<head_map>(shape.n_stream, head_map(shape.n_layer, shape.n_head_kv, shape.kv_size, fill));
    };

    if (pol.needs_importance()) {
        mass = make(0.0f);
    }
    if (pol.combine == combine_rule::nearest_mean) {
        count = make(1.0f);
    }

    kinds.assign(shape.n_stream, std::vector<cell_kind>(shape.kv_size, cell_kind::text));
    totals.assign(shape.n_stream, std::vector<float>(shape.kv_size, 0.0f));
    biased.assign(shape.n_stream, std::vector<uint8_t>(shape.kv_size, 0));

    if (!pol.needs_bias()) {
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

void cell_store::set_biased(uint32_t strm, int32_t cell, bool value) {
    n_biased += (int64_t) value - (int64_t) biased[strm][cell];
    biased[strm][cell] = value;
}

void cell_store::reset_cell(uint32_t strm, int32_t cell, cell_kind kind) {
    kinds[strm][cell]  = kind;
    totals[strm][cell] = 0.0f;

    for (int32_t il = 0; il < shape.n_layer; ++il) {
        for (int32_t ih = 0; ih < shape.n_head_kv; ++ih) {
            if (has_mass()) {
                mass[strm].row(il, ih)[cell] = 0.0f;
            }
            if (has_count()) {
                count[strm].row(il, ih)[cell] = 1.0f;
            }
            if (biased[strm][cell]) {
                bias[strm].row(il, ih)[cell] = 0.0f;
            }
        }
    }

    if (biased[strm][cell]) {
        set_biased(strm, cell, false);
        upload_bias(strm, cell, cell + 1);
    }
}

void cell_store::reset() {
    for (int32_t s = 0; s < shape.n_stream; ++s) {
        if (has_mass()) {
            std::fill(mass[s].data.begin(), mass[s].data.end(), 0.0f);
        }
        if (has_count()) {
            std::fill(count[s].data.begin(), count[s].data.end(), 1.0f);
        }
        if (has_bias_map()) {
            std::fill(bias[s].data.begin(), bias[s].data.end(), 0.0f);
        }
        std::fill(totals[s].begin(), totals[s].end(), 0.0f);
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

cell_state cell_store::gather(uint32_t strm, const std::vector<int32_t> & rows) const {
    const int32_t n = (int32_t) rows.size();

    const auto take = [&](const std::vector<head_map> & from, float fill) {
        head_map res(shape.n_layer, shape.n_head_kv, n, fill);
        if (!from.empty()) {
            for (int32_t il = 0; il < shape.n_layer; ++il) {
                for (int32_t ih = 0; ih < shape.n_head_kv; ++ih) {
                    const float * src = from[strm].row(il, ih);
                    float *       dst = res.row(il, ih);
                    for (int32_t i = 0; i < n; ++i) {
                        dst[i] = src[rows[i]];
                    }
                }
            }
        }
        return res;
    };

    return { take(mass, 0.0f), take(count, 1.0f), take(bias, 0.0f) };
}

void cell_store::scatter(uint32_t strm, const std::vector<int32_t> & rows, const cell_state & state) {
    const auto put = [&](std::vector<head_map> & to, const head_map & from) {
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
    };

    put(mass, state.mass);
    put(count, state.count);
    put(bias, state.bias);
    update_totals(strm, rows);

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

void cell_store::update_totals(uint32_t strm, const std::vector<int32_t> & rows) {
    if (!has_mass()) {
        return;
    }
    for (const int32_t cell : rows) {
        totals[strm][cell] = 0.0f;
    }
    for (int32_t il = 0; il < shape.n_layer; ++il) {
        for (int32_t ih = 0; ih < shape.n_head_kv; ++ih) {
            const float * src = mass[strm].row(il, ih);
            for (const int32_t cell : rows) {
                totals[strm][cell] += src[cell];
            }
        }
    }
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
