// The resident memory of K and V follows the cells in use: rows beyond the last one go back to the operating system.

#include "runtime/elastic_cache.h"
#include "runtime/pages.h"

#include "llama-kv-cache.h"

#include <algorithm>

namespace elastic {

// rows [begin, end) of one K or V tensor in one stream; returns the bytes given back
static size_t release_tensor(ggml_tensor * t, uint32_t strm, int64_t kv_size, bool transposed, int64_t begin, int64_t end) {
    if (!can_release(t->buffer) || begin >= end) {
        return 0;
    }
    uint8_t * base = (uint8_t *) t->data + strm * t->nb[2];
    if (!transposed) {
        return release_bytes(base + begin * t->nb[1], (end - begin) * t->nb[1]);
    }
    const int64_t size = (int64_t) ggml_type_size(t->type);
    size_t        res  = 0;
    for (int64_t e = 0; e < t->ne[0]; ++e) {
        res += release_bytes(base + (e * kv_size + begin) * size, (end - begin) * size);
    }
    return res;
}

void elastic_cache::release_rows(uint32_t strm, int32_t n_used) {
    if (!cfg.release_memory || !active()) {
        return;
    }
    // an element of all cells lies side by side in a transposed V, so only long runs of cells hold whole pages
    const bool    transposed = kv.get_v_trans();
    const int32_t n_page     = transposed ? (int32_t) (page_size() / ggml_type_size(kv.type_v())) : 1;
    const bool    with_v     = n_touched_v[strm] - n_used >= n_page;

    for (const int32_t il : shape.layer_ids) {
        stats.n_bytes_released += release_tensor(kv.get_k_storage(il), strm, shape.kv_size, false, n_used, n_touched[strm]);
        if (with_v) {
            stats.n_bytes_released += release_tensor(kv.get_v_storage(il), strm, shape.kv_size, transposed, n_used, n_touched_v[strm]);
        }
    }
    n_touched[strm] = std::min(n_touched[strm], n_used);
    if (with_v) {
        n_touched_v[strm] = transposed ? std::min(n_touched_v[strm], n_used + n_page) : n_used;
    }
}

void elastic_cache::clear_buffer(ggml_backend_buffer_t buffer) {
    if (cfg.release_memory && active()) {
        clear_lazily(buffer);
    } else {
        ggml_backend_buffer_clear(buffer, 0);
    }
}

}  // namespace elastic
