// The resident memory of K and V follows the cells in use: rows beyond the last one go back to the operating system.

#include "runtime/elastic_cache.h"
#include "runtime/pages.h"

#include "llama-kv-cache.h"

#include <algorithm>

namespace elastic {

// rows [begin, end) of one K or V tensor in one stream; returns the bytes given back
static size_t release_tensor(ggml_tensor * t, uint32_t strm, int64_t begin, int64_t end) {
    if (!can_release(t->buffer) || begin >= end) {
        return 0;
    }
    return release_bytes((uint8_t *) t->data + strm * t->nb[2] + begin * t->nb[1], (end - begin) * t->nb[1]);
}

// rows that may take memory from now on, as they are written
void elastic_cache::note_touched(uint32_t strm, int32_t n_rows) {
    n_touched[strm]   = std::max(n_touched[strm], n_rows);
    n_touched_v[strm] = std::max(n_touched_v[strm], moves_v && n_rows > 0 ? stride_v : n_rows);
}

void elastic_cache::release_rows(uint32_t strm, int32_t n_used) {
    if (!releases()) {
        return;
    }
    for (const int32_t il : shape.layer_ids) {
        stats.n_bytes_released += release_tensor(kv.get_k_storage(il), strm, n_used, n_touched[strm]);
    }
    n_touched[strm] = std::min(n_touched[strm], n_used);
    release_v(strm, n_used);
}

bool elastic_cache::frees_rows() const {
    return releases() && !kv.get_v_trans() && std::all_of(shape.layer_ids.begin(), shape.layer_ids.end(), [&](int32_t il) {
               return can_release(kv.get_k_storage(il)->buffer) && can_release(kv.get_v_storage(il)->buffer);
           });
}

// Rows that a layer does without. Of a transposed V they are no pages of their own.
void elastic_cache::release_absent(uint32_t strm, const std::vector<int32_t> & rows) {
    if (!releases() || !store->any_absent()) {
        return;
    }
    std::vector<int32_t> sorted(rows);
    std::sort(sorted.begin(), sorted.end());
    for (int32_t il = 0; il < shape.n_layer; ++il) {
        for (size_t begin = 0, end = 0; begin < sorted.size(); begin = end) {
            const bool absent = store->is_absent(strm, sorted[begin], il);
            for (end = begin + 1;
                 end < sorted.size() && sorted[end] == sorted[end - 1] + 1 && store->is_absent(strm, sorted[end], il) == absent;) {
                ++end;
            }
            if (absent) {
                const int32_t il_model = shape.layer_ids[il];
                stats.n_bytes_released += release_tensor(kv.get_k_storage(il_model), strm, sorted[begin], sorted[end - 1] + 1);
                if (!kv.get_v_trans()) {
                    stats.n_bytes_released += release_tensor(kv.get_v_storage(il_model), strm, sorted[begin], sorted[end - 1] + 1);
                }
            }
        }
    }
}

// what a restored state, a copied stream or a shift of positions wrote to rows that layers do without
void elastic_cache::release_refilled() {
    for (const auto & [seq_id, _] : seqs) {
        const uint32_t strm = kv.get_stream(seq_id);
        if (refilled[strm]) {
            release_absent(strm, logical_cells(seq_id));
        }
    }
    std::fill(refilled.begin(), refilled.end(), 0);
}

// a transposed V takes its stride times its elements, which is as much as `stride` rows would
void elastic_cache::release_v(uint32_t strm, int32_t n_used) {
    if (!releases() || (kv.get_v_trans() && !moves_v)) {
        return;
    }
    const int32_t n_held = moves_v && n_used > 0 ? stride_v : n_used;
    for (const int32_t il : shape.layer_ids) {
        stats.n_bytes_released += release_tensor(kv.get_v_storage(il), strm, n_held, n_touched_v[strm]);
    }
    n_touched_v[strm] = std::min(n_touched_v[strm], n_held);
}

void elastic_cache::clear_buffer(ggml_backend_buffer_t buffer) {
    if (releases()) {
        clear_lazily(buffer);
    } else {
        ggml_backend_buffer_clear(buffer, 0);
    }
}

}  // namespace elastic
