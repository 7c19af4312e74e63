#include "runtime/resident_memory.h"

#include "runtime/pages.h"

#include <algorithm>

namespace elastic {

// rows that must be free at the end before a batch gives them back
static constexpr int32_t N_RELEASE = 256;

// rows [begin, end) of one K or V tensor in one stream; returns the bytes given back
static size_t release_rows(ggml_tensor * t, uint32_t strm, int64_t begin, int64_t end) {
    if (!can_release(t->buffer) || begin >= end) {
        return 0;
    }
    return release_bytes((uint8_t *) t->data + strm * t->nb[2] + begin * t->nb[1], (end - begin) * t->nb[1]);
}

resident_memory::resident_memory(const kv_view & kv, const layer_bias & bias, bool enabled)
    : kv(kv), bias(bias), enabled(enabled), n_resident(kv.shape.n_stream, 0), dirty(kv.shape.n_stream, 0) {}

bool resident_memory::can_free_layers(const kv_view & kv) {
    for (int32_t il = 0; il < kv.shape.n_layer; ++il) {
        if (!can_release(kv.k(il)->buffer) || !can_release(kv.v(il)->buffer)) {
            return false;
        }
    }
    return true;
}

void resident_memory::wrote(uint32_t strm, int32_t n_rows) {
    n_resident[strm] = std::max(n_resident[strm], n_rows);
}

void resident_memory::before_batch(const std::vector<llama_seq_id> & seq_ids) {
    for (int32_t s = 0; s < kv.shape.n_stream; ++s) {
        if (n_resident[s] - kv.n_used(s) >= N_RELEASE) {
            release_tail(s, kv.n_used(s));
        }
    }
    for (const llama_seq_id seq_id : seq_ids) {
        const uint32_t strm = kv.stream(seq_id);
        if (dirty[strm]) {
            release_masked(strm, kv.rows(seq_id));
        }
    }
    std::fill(dirty.begin(), dirty.end(), 0);
}

void resident_memory::freed(uint32_t strm, const std::vector<int32_t> & rows) {
    release_tail(strm, kv.n_used(strm));
    release_masked(strm, rows);
}

void resident_memory::cleared() {
    for (int32_t s = 0; s < kv.shape.n_stream; ++s) {
        release_tail(s, 0);
    }
}

void resident_memory::release_tail(uint32_t strm, int32_t n_used) {
    for (int32_t il = 0; enabled && il < kv.shape.n_layer; ++il) {
        bytes_released += release_rows(kv.k(il), strm, n_used, n_resident[strm]);
        bytes_released += release_rows(kv.v(il), strm, n_used, n_resident[strm]);
    }
    n_resident[strm] = enabled ? std::min(n_resident[strm], n_used) : n_resident[strm];
}

// neighboring rows together, as memory goes back page by page
void resident_memory::release_masked(uint32_t strm, std::vector<int32_t> rows) {
    if (!enabled || !bias.any_masked()) {
        return;
    }
    std::sort(rows.begin(), rows.end());
    for (int32_t il = 0; il < kv.shape.n_layer; ++il) {
        for (size_t begin = 0, end = 0; begin < rows.size(); begin = end) {
            const bool masked = bias.is_masked(strm, rows[begin], il);
            end               = begin + 1;
            while (end < rows.size() && rows[end] == rows[end - 1] + 1 && bias.is_masked(strm, rows[end], il) == masked) {
                ++end;
            }
            if (masked) {
                bytes_released += release_rows(kv.k(il), strm, rows[begin], rows[end - 1] + 1);
                bytes_released += release_rows(kv.v(il), strm, rows[begin], rows[end - 1] + 1);
            }
        }
    }
}

}  // namespace elastic
