#include "runtime/kv_access.h"

#include "core/rows.h"

#include "ggml-backend.h"
#include "llama-kv-cache.h"

#include <algorithm>

namespace elastic {

int32_t kv_shape::index_of(int32_t il_model) const {
    const auto it = std::find(layer_ids.begin(), layer_ids.end(), il_model);
    return it == layer_ids.end() ? -1 : (int32_t) (it - layer_ids.begin());
}

kv_layer_access::kv_layer_access(const llama_kv_cache & kv, const kv_shape & shape, int32_t il_cache, uint32_t strm)
    : t_k(kv.get_k_storage(shape.layer_ids[il_cache])), t_v(kv.get_v_storage(shape.layer_ids[il_cache])), strm(strm) {
    k.type        = t_k->type;
    k.n_head_kv   = shape.n_head_kv;
    k.n_embd_head = shape.n_embd_head_k;
    k.n_rows      = shape.kv_size;
    k.row_bytes   = (int64_t) t_k->nb[1];

    v.type        = t_v->type;
    v.n_head_kv   = shape.n_head_kv;
    v.n_embd_head = shape.n_embd_head_v;
    v.row_bytes   = (int64_t) t_v->nb[1];
    v.transposed  = kv.get_v_trans();
    v.n_rows      = v.transposed ? (int64_t) kv.get_v_stride() : shape.kv_size;
}

static void load(ggml_tensor * t, uint32_t strm, kv_rows & rows, std::vector<uint8_t> & buf) {
    if (rows.data) {
        return;
    }
    if (ggml_backend_buffer_is_host(t->buffer)) {
        rows.data = (uint8_t *) t->data + strm * t->nb[2];
        return;
    }
    buf.resize(t->nb[2]);
    ggml_backend_tensor_get(t, buf.data(), strm * t->nb[2], buf.size());
    rows.data = buf.data();
}

void kv_layer_access::load_k() {
    load(t_k, strm, k, buf_k);
}

void kv_layer_access::load_v() {
    load(t_v, strm, v, buf_v);
}

void kv_layer_access::store() {
    if (!buf_k.empty()) {
        ggml_backend_tensor_set(t_k, buf_k.data(), strm * t_k->nb[2], buf_k.size());
    }
    if (!buf_v.empty()) {
        ggml_backend_tensor_set(t_v, buf_v.data(), strm * t_v->nb[2], buf_v.size());
    }
}

static void move(ggml_tensor * t, uint32_t strm, kv_rows & rows, std::vector<uint8_t> & buf, int32_t from,
                 const std::vector<int32_t> & to) {
    if (ggml_backend_buffer_is_host(t->buffer)) {
        load(t, strm, rows, buf);
        for (int32_t ih = 0; ih < rows.n_head_kv; ++ih) {
            if (to[ih] != from) {
                copy_head(rows, from, to[ih], ih);
            }
        }
        return;
    }
    // a head is one piece, or, transposed, as many as it has elements
    const size_t n_bytes = head_bytes(rows);
    const size_t n       = rows.transposed ? rows.n_embd_head : 1;
    const size_t size    = n_bytes / n;
    const size_t stride  = rows.transposed ? rows.n_rows * size : n_bytes;

    const auto offset = [&](int32_t row, int32_t ih) {
        return strm * t->nb[2] + row * (rows.transposed ? size : rows.row_bytes) + ih * n * stride;
    };
    std::vector<uint8_t> data(rows.n_head_kv * n_bytes);
    if (rows.transposed) {
        ggml_backend_tensor_get_2d(t, data.data(), offset(from, 0), size, rows.n_head_kv * n, stride, size);
    } else {
        ggml_backend_tensor_get(t, data.data(), offset(from, 0), data.size());
    }
    for (int32_t ih = 0; ih < rows.n_head_kv; ++ih) {
        if (to[ih] != from) {
            ggml_backend_tensor_set_2d(t, data.data() + ih * n_bytes, offset(to[ih], ih), size, n, stride, size);
        }
    }
}

void kv_layer_access::move_heads(int32_t from, const std::vector<int32_t> & to) {
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
