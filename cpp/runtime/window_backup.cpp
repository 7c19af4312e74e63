#include "runtime/window_backup.h"

#include "runtime/kv_cells.h"

#include "ggml-backend.h"
#include "llama-hparams.h"
#include "llama-kv-cache.h"

#include <algorithm>

namespace elastic {

// one row of K and V of every layer, as f(tensor, offset, bytes)
template <typename F> static void each_row(const llama_kv_cache & kv, llama_seq_id seq_id, uint32_t row, F f) {
    for (const uint32_t il : kv.get_layer_ids()) {
        for (ggml_tensor * t : { kv.get_k_storage((int32_t) il), kv.get_v_storage((int32_t) il) }) {
            f(t, kv.get_stream(seq_id) * t->nb[2] + row * t->nb[1], ggml_row_size(t->type, t->ne[0]));
        }
    }
}

void window_backup::begin(std::map<llama_seq_id, llama_pos> of_sequences) {
    ends = std::move(of_sequences);
    saved.clear();
}

void window_backup::before_batch(const llama_batch & batch) {
    if (!parts.window) {
        return;
    }
    std::map<llama_seq_id, llama_pos> last;
    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        for (int32_t j = 0; j < batch.n_seq_id[i]; ++j) {
            auto & pos = last[batch.seq_id[i][j]];
            pos        = std::max(pos, batch.pos[i]);
        }
    }
    for (const auto & [seq_id, pos] : last) {
        if (ends.count(seq_id)) {
            save(seq_id, ends[seq_id], pos);
        }
    }
}

// cells that a token at `first` looks at, and one at `last` does not
void window_backup::save(llama_seq_id seq_id, llama_pos first, llama_pos last) {
    const auto & kv    = *parts.window;
    const auto & cells = kv.get_cells(seq_id);
    auto &       known = saved[seq_id];
    for (const auto & [pos, row] : cells.seq_pos_get(seq_id)) {
        if (!parts.in_window(pos, first) || parts.in_window(pos, last) || pos >= first || known.count(row) || cells.seq_count(row) > 1) {
            continue;
        }
        auto & c = known[row] = { place_of(cells, row), {} };
        each_row(kv, seq_id, row, [&](ggml_tensor * t, size_t offset, size_t n) {
            c.data.resize(c.data.size() + n);
            ggml_backend_tensor_get(t, c.data.data() + c.data.size() - n, offset, n);
        });
    }
}

void window_backup::restore() {
    for (const auto & [seq_id, rows] : saved) {
        auto & cells = parts.window->get_cells_mut(parts.window->get_stream(seq_id));
        for (const auto & [row, c] : rows) {
            if (!cells.is_empty(row)) {  // it was not overwritten: what was is free by now
                continue;
            }
            put_cell(cells, row, c.place, seq_id);
            size_t start = 0;
            each_row(*parts.window, seq_id, row, [&](ggml_tensor * t, size_t offset, size_t n) {
                ggml_backend_tensor_set(t, c.data.data() + start, offset, n);
                start += n;
            });
        }
    }
    saved.clear();
}

}  // namespace elastic
