#include "runtime/kv_layers.h"

#include "ggml-backend.h"
#include "kernels/parallel.h"

#include <algorithm>

namespace elastic {

kv_layer layer_of(const kv_view & kv, int32_t il, uint32_t strm) {
    return { kv.k(il), kv.v(il), kv.shape, strm };
}

std::vector<kv_layer> loaded_layers(const kv_view & kv, uint32_t strm, int32_t n_threads) {
    const int32_t         n_rows = kv.n_used(strm);
    std::vector<kv_layer> res;
    for (int32_t il = 0; il < kv.shape.n_layer; ++il) {
        res.push_back(layer_of(kv, il, strm));
    }
    parallel_for(kv.shape.n_layer, n_threads, [&](int32_t il) { res[il].reserve(n_rows); });
    for (auto & layer : res) {
        layer.load(n_rows);
    }
    return res;
}

bool on_host(const kv_view & kv) {
    for (int32_t il = 0; il < kv.shape.n_layer; ++il) {
        if (!ggml_backend_buffer_is_host(kv.k(il)->buffer) || !ggml_backend_buffer_is_host(kv.v(il)->buffer)) {
            return false;
        }
    }
    return true;
}

static kv_rows rows_of(const ggml_tensor * t, int32_t n_head_kv, int32_t n_embd_head, int32_t n_rows) {
    kv_rows res;
    res.type        = t->type;
    res.n_head_kv   = n_head_kv;
    res.n_embd_head = n_embd_head;
    res.n_rows      = n_rows;
    res.row_bytes   = (int64_t) t->nb[1];
    return res;
}

kv_layer::kv_layer(ggml_tensor * t_k, ggml_tensor * t_v, const kv_shape & shape, uint32_t strm)
    : k(rows_of(t_k, shape.n_head_kv, shape.n_embd_head_k, shape.kv_size)),
      v(rows_of(t_v, shape.n_head_kv, shape.n_embd_head_v, shape.kv_size)), t_k(t_k), t_v(t_v), strm(strm) {}

static void reserve_rows(const ggml_tensor * t, host_copy & buf, int32_t n_rows) {
    const size_t n = std::min((int64_t) n_rows, t->ne[1]) * t->nb[1];
    if (!ggml_backend_buffer_is_host(t->buffer) && buf.size() != n) {
        buf.resize(n);
    }
}

void kv_layer::reserve(int32_t n_rows) {
    reserve_rows(t_k, buf_k, n_rows);
    reserve_rows(t_v, buf_v, n_rows);
}

static void load_rows(ggml_tensor * t, uint32_t strm, kv_rows & rows, host_copy & buf, int32_t n_rows) {
    if (rows.data) {
        return;
    }
    if (ggml_backend_buffer_is_host(t->buffer)) {
        rows.data = (uint8_t *) t->data + strm * t->nb[2];
        return;
    }
    reserve_rows(t, buf, n_rows);
    ggml_backend_tensor_get(t, buf.data(), strm * t->nb[2], buf.size());
    rows.data = buf.data();
}

void kv_layer::load(int32_t n_rows) {
    load_rows(t_k, strm, k, buf_k, n_rows);
    load_rows(t_v, strm, v, buf_v, n_rows);
}

static void store_rows(ggml_tensor * t, uint32_t strm, const host_copy & buf, int32_t n_rows) {
    if (buf.size() > 0) {
        ggml_backend_tensor_set(t, buf.data(), strm * t->nb[2], std::min(buf.size(), n_rows * t->nb[1]));
    }
}

void kv_layer::store(int32_t n_rows) {
    store_rows(t_k, strm, buf_k, n_rows);
    store_rows(t_v, strm, buf_v, n_rows);
}

static void move(ggml_tensor * t, uint32_t strm, kv_rows & rows, host_copy & buf, int32_t from, const std::vector<int32_t> & to) {
    if (ggml_backend_buffer_is_host(t->buffer)) {
        load_rows(t, strm, rows, buf, rows.n_rows);
        for (int32_t ih = 0; ih < rows.n_head_kv; ++ih) {
            if (to[ih] != from) {
                copy_head(rows, from, to[ih], ih);
            }
        }
        return;
    }
    const size_t n_bytes = head_bytes(rows);
    const size_t start   = strm * t->nb[2];

    std::vector<uint8_t> data(rows.n_head_kv * n_bytes);
    ggml_backend_tensor_get(t, data.data(), start + from * rows.row_bytes, data.size());
    for (int32_t ih = 0; ih < rows.n_head_kv; ++ih) {
        if (to[ih] != from) {
            ggml_backend_tensor_set(t, data.data() + ih * n_bytes, start + to[ih] * rows.row_bytes + ih * n_bytes, n_bytes);
        }
    }
}

void kv_layer::move_heads(int32_t from, const std::vector<int32_t> & to) {
    move(t_k, strm, k, buf_k, from, to);
    move(t_v, strm, v, buf_v, from, to);
}

void kv_source::load_k(int32_t il, int32_t ih, float * dst) const {
    read_f32(layers[il].k, rows, ih, dst);
}

void kv_source::load_v(int32_t il, int32_t ih, float * dst) const {
    read_f32(layers[il].v, rows, ih, dst);
}

}  // namespace elastic
