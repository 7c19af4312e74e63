#include "runtime/device_sums.h"

#include <algorithm>
#include <map>
#include <stdexcept>

namespace elastic {

void device_sums::reserve(int64_t n) {
    if (n <= capacity) {
        return;
    }
    capacity = std::max(n, 2 * capacity);
    n_grown++;
    blocks.clear();

    std::map<ggml_backend_buffer_type_t, std::vector<int32_t>> layers_of;
    for (const int32_t il : layers) {
        layers_of[ggml_backend_buffer_get_type(kv.k(kv.shape.owners[il])->buffer)].push_back(il);
    }
    for (const auto & [buft, of_buft] : layers_of) {
        ggml_init_params params = { ggml_tensor_overhead(), nullptr, true };
        block            b      = {};
        b.ctx.reset(ggml_init(params));
        b.n_layers = (int64_t) of_buft.size();
        b.tensor   = ggml_new_tensor_1d(b.ctx.get(), GGML_TYPE_F32, capacity * b.n_layers);
        b.buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(b.ctx.get(), buft));
        if (!b.buf) {
            throw std::runtime_error("[elastic] a device has no memory for the sums of the attention");
        }
        for (size_t i = 0; i < of_buft.size(); ++i) {
            slots[of_buft[i]] = { blocks.size(), (int64_t) i };
        }
        blocks.push_back(std::move(b));
    }
}

ggml_tensor * device_sums::place(ggml_context * ctx, int32_t il, int64_t n) const {
    return ggml_view_1d(ctx, blocks[slots[il].block].tensor, n, slots[il].index * n * (int64_t) sizeof(float));
}

void device_sums::fetch(int64_t n) {
    for (auto & b : blocks) {
        b.data.resize(n * b.n_layers);
        ggml_backend_tensor_get(b.tensor, b.data.data(), 0, b.data.size() * sizeof(float));
    }
}

}  // namespace elastic
