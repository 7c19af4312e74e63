// Without flash attention V is stored transposed: an element of all cells side by side, and the next element a stride further
// on. llama.cpp's stride is the whole context, so that each element of a few cells lies on a page of its own. Here the stride
// follows the cells in use: they are read as fast as in a small context, and what lies behind them goes back to the system.

#include "core/parallel.h"
#include "runtime/elastic_cache.h"

#include "llama-context.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <cstring>

namespace elastic {

// llama.cpp attends over so many cells at a time
static int32_t padded(int32_t n_cells) {
    return (n_cells + 255) / 256 * 256;
}

// [n_elements] rows of n values each, from one stride to another, within the same memory
static void move_rows_apart(uint8_t * data, int64_t n_elements, size_t size, int64_t from, int64_t to, int64_t n) {
    const auto move = [&](int64_t e) {
        std::memmove(data + e * to * size, data + e * from * size, n * size);
    };
    for (int64_t e = 0; e < n_elements; ++e) {
        move(to < from ? e : n_elements - 1 - e);  // never onto a row that still has to move
    }
}

int32_t elastic_cache::stride_for(int32_t n_cells) const {
    return std::min(shape.kv_size, padded(std::max(1, n_cells)));
}

int32_t elastic_cache::min_stride() const {
    return moves_v ? stride_for(1) : shape.kv_size;
}

void elastic_cache::restore_layout() {
    if (moves_v && stride_v < shape.kv_size) {
        ctx.memory_update(false);  // copies of whole streams that still wait
        set_v_stride(shape.kv_size);
    }
}

int32_t elastic_cache::n_used_max() const {
    int32_t res = 0;
    for (int32_t s = 0; s < shape.n_stream; ++s) {
        res = std::max(res, n_used(s));
    }
    return res;
}

void elastic_cache::set_v_stride(int32_t to) {
    const int32_t from = stride_v;
    ctx.synchronize();
    parallel_for(shape.n_layer, n_threads(), [&](int32_t il) {
        ggml_tensor * t = kv.get_v_storage(shape.layer_ids[il]);
        for (int32_t s = 0; s < shape.n_stream; ++s) {
            const int32_t n = std::min({ n_used(s), from, to });
            move_rows_apart((uint8_t *) t->data + s * t->nb[2], t->ne[0], ggml_type_size(t->type), from, to, n);
        }
    });
    stride_v = to;
    for (int32_t & touched : n_touched_v) {
        touched = touched > 0 ? std::max(touched, to) : 0;
    }
}

// before V of new cells is stored. A prompt goes on growing, an answer hardly
void elastic_cache::grow_v(bool in_prompt) {
    const int32_t n = n_used_max();
    if (moves_v && padded(n) > stride_v) {
        set_v_stride(stride_for(in_prompt ? 2 * n : n + n / 4));
    }
}

// after cells became free: not for a few, as all that is left has to move
void elastic_cache::shrink_v() {
    const int32_t n  = n_used_max();
    const int32_t to = stride_for(n + n / 4);
    if (!moves_v || to + to / 2 > stride_v) {
        return;
    }
    set_v_stride(to);
    for (int32_t s = 0; s < shape.n_stream; ++s) {
        release_v(s, n_used(s));
    }
}

}  // namespace elastic
