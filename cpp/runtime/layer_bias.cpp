#include "runtime/layer_bias.h"

#include "ggml-backend.h"
#include "runtime/pages.h"

#include <algorithm>
#include <map>

namespace elastic {

layer_bias::layer_bias(const kv_view & kv, bool wanted)
    : n_layer(kv.shape.n_layer), n_head_kv(kv.shape.n_head_kv), kv_size(kv.shape.kv_size) {
    if (!wanted) {
        return;
    }
    for (int32_t s = 0; s < kv.shape.n_stream; ++s) {
        maps.emplace_back(kv.shape.n_heads(), kv_size);
    }
    biased.assign(kv.shape.n_stream, std::vector<uint8_t>(kv_size, 0));
    masked.resize(kv.shape.n_stream);
    changed.resize(kv.shape.n_stream);
    make_tensors(kv);
}

// beside the keys of its layer, so that no graph has to move it between devices
void layer_bias::make_tensors(const kv_view & kv) {
    std::map<ggml_backend_buffer_type_t, std::vector<int32_t>> layers_of;
    for (int32_t il = 0; il < n_layer; ++il) {
        layers_of[ggml_backend_buffer_get_type(kv.k(il)->buffer)].push_back(il);
    }
    tensors.resize(n_layer);
    for (const auto & [buft, layers] : layers_of) {
        ggml_init_params params = { layers.size() * ggml_tensor_overhead(), nullptr, true };
        ggml_context_ptr ctx(ggml_init(params));
        for (const int32_t il : layers) {
            tensors[il] = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, kv_size, n_head_kv, kv.shape.n_stream);
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

int64_t layer_bias::bytes_per_cell() const {
    return is_kept() ? (int64_t) n_layer * n_head_kv * (int64_t) sizeof(float) : 0;
}

void layer_bias::set_biased(uint32_t strm, int32_t cell, bool value) {
    n_biased += (int64_t) value - (int64_t) biased[strm][cell];
    biased[strm][cell] = value;
}

void layer_bias::set_masked(uint32_t strm, int32_t cell, int32_t il, bool value) {
    auto & flags = masked[strm];
    if (flags.empty() && !value) {
        return;
    }
    flags.resize((size_t) n_layer * kv_size);  // only where some cell is masked
    auto & is = flags[(size_t) il * kv_size + cell];
    n_masked += (int64_t) value - (int64_t) is;
    is = value;
}

void layer_bias::reset() {
    for (auto & m : maps) {
        m.clear();
    }
    for (auto & flags : biased) {
        std::fill(flags.begin(), flags.end(), 0);
    }
    for (auto & flags : masked) {
        flags = {};
    }
    for (auto & buf : bufs) {
        clear_lazily(buf.get());
    }
    std::fill(changed.begin(), changed.end(), range{});
    n_biased = 0;
    n_masked = 0;
}

void layer_bias::reset_cell(uint32_t strm, int32_t cell) {
    if (!is_kept() || !biased[strm][cell]) {
        return;
    }
    for (int32_t r = 0; r < n_layer * n_head_kv; ++r) {
        maps[strm].row(r)[cell] = 0.0f;
    }
    for (int32_t il = 0; n_masked > 0 && il < n_layer; ++il) {
        set_masked(strm, cell, il, false);
    }
    set_biased(strm, cell, false);
    changed[strm].add(cell, cell + 1);
}

void layer_bias::copy_stream(uint32_t strm_src, uint32_t strm_dst, int32_t n) {
    if (!is_kept()) {
        return;
    }
    maps[strm_dst].copy_from(maps[strm_src], n);
    // beyond n, flags go on to say what the destination holds
    for (int32_t i = 0; i < n; ++i) {
        set_biased(strm_dst, i, biased[strm_src][i] != 0);
        for (int32_t il = 0; n_masked > 0 && il < n_layer; ++il) {
            set_masked(strm_dst, i, il, is_masked(strm_src, i, il));
        }
    }
    changed[strm_dst].add(0, n);
}

void layer_bias::set(uint32_t strm, int32_t cell, int32_t il, int32_t ih, float value) {
    float & x = maps[strm].row(index(il, ih))[cell];
    if (x == value) {
        return;
    }
    x = value;
    if (value != 0.0f) {
        set_biased(strm, cell, true);
    }
    set_masked(strm, cell, il, maps[strm].row(index(il, 0))[cell] == masked_bias);
    changed[strm].add(cell, cell + 1);
}

void layer_bias::move_head(uint32_t strm, int32_t src, int32_t dst, int32_t il, int32_t ih) {
    if (is_kept()) {
        set(strm, dst, il, ih, maps[strm].row(index(il, ih))[src]);
    }
}

void layer_bias::mask(uint32_t strm, int32_t cell, int32_t il) {
    for (int32_t ih = 0; ih < n_head_kv; ++ih) {
        set(strm, cell, il, ih, masked_bias);
    }
}

head_map layer_bias::gather(uint32_t strm, const std::vector<int32_t> & rows) const {
    head_map res(n_layer, n_head_kv, (int32_t) rows.size());
    if (is_kept()) {
        maps[strm].gather(rows, res);
    }
    return res;
}

void layer_bias::scatter(uint32_t strm, const std::vector<int32_t> & rows, const head_map & values) {
    if (!is_kept() || rows.empty()) {
        return;
    }
    maps[strm].scatter(rows, values);
    for (size_t i = 0; i < rows.size(); ++i) {
        bool any = false;
        for (int32_t il = 0; il < n_layer; ++il) {
            for (int32_t ih = 0; ih < n_head_kv; ++ih) {
                any |= values.row(il, ih)[i] != 0.0f;
            }
            set_masked(strm, rows[i], il, values.row(il, 0)[i] == masked_bias);
        }
        set_biased(strm, rows[i], any);
    }
    const auto [lo, hi] = std::minmax_element(rows.begin(), rows.end());
    changed[strm].add(*lo, *hi + 1);
}

std::vector<int32_t> layer_bias::cells_per_layer(uint32_t strm, const std::vector<int32_t> & rows) const {
    std::vector<int32_t> res(n_layer, (int32_t) rows.size());
    for (int32_t il = 0; n_masked > 0 && il < n_layer; ++il) {
        for (const int32_t row : rows) {
            res[il] -= is_masked(strm, row, il);
        }
    }
    return res;
}

void layer_bias::range::add(int32_t first, int32_t last) {
    lo = hi == 0 ? first : std::min(lo, first);
    hi = std::max(hi, last);
}

void layer_bias::upload() {
    for (size_t strm = 0; strm < changed.size(); ++strm) {
        if (changed[strm].lo < changed[strm].hi) {
            upload((uint32_t) strm, changed[strm]);
        }
        changed[strm] = {};
    }
}

// to a device all heads of a layer at once
void layer_bias::upload(uint32_t strm, const range & cells) {
    for (int32_t il = 0; il < n_layer; ++il) {
        ggml_tensor * t = tensors[il];
        if (!ggml_backend_buffer_is_host(t->buffer)) {
            ggml_backend_tensor_set(t, maps[strm].row(index(il, 0)), strm * t->nb[2], t->nb[2]);
            continue;
        }
        for (int32_t ih = 0; ih < n_head_kv; ++ih) {
            const float * row = maps[strm].row(index(il, ih)) + cells.lo;
            ggml_backend_tensor_set(t, row, strm * t->nb[2] + ih * t->nb[1] + cells.lo * sizeof(float),
                                    (cells.hi - cells.lo) * sizeof(float));
        }
    }
}

}  // namespace elastic
