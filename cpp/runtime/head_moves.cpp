#include "runtime/head_moves.h"

#include "runtime/kv_layers.h"

#include <algorithm>
#include <stdexcept>

namespace elastic {

static ggml_backend_dev_t device_of(const ggml_tensor * t) {
    return ggml_backend_buffer_is_host(t->buffer) ? nullptr : ggml_backend_buft_get_device(ggml_backend_buffer_get_type(t->buffer));
}

// The graph of one device and stream: rows are copied as f32, which changes no bit of what they are.
class head_moves::device {
  public:
    device(const kv_view & kv, ggml_backend_dev_t dev, const std::vector<int32_t> & layers, uint32_t strm)
        : layers(layers), n_head_kv(kv.shape.n_head_kv), backend(ggml_backend_dev_init(dev, nullptr)) {
        if (!backend) {
            throw std::runtime_error("[elastic] a device cannot be opened to move rows of K and V");
        }
        const size_t     n_nodes = layers.size() * 2 * 6;
        ggml_init_params params  = { (n_nodes + 1) * ggml_tensor_overhead() + ggml_graph_overhead_custom(n_nodes, false), nullptr, true };
        ctx.reset(ggml_init(params));
        graph = ggml_new_graph_custom(ctx.get(), n_nodes, false);
        rows  = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_I32, n_head_kv, 2, (int64_t) layers.size());
        ggml_set_input(rows);
        for (size_t i = 0; i < layers.size(); ++i) {
            add(kv.k(layers[i]), strm, i);
            add(kv.v(layers[i]), strm, i);
        }
        alloc.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend.get())));
        if (!ggml_gallocr_alloc_graph(alloc.get(), graph)) {
            throw std::runtime_error("[elastic] a device has no memory to move rows of K and V");
        }
    }

    bool run(int32_t from, const std::vector<std::vector<int32_t>> & to) {
        std::vector<int32_t> data;
        bool                 any = false;
        for (const int32_t il : layers) {
            for (int32_t ih = 0; ih < n_head_kv; ++ih) {
                data.push_back(from * n_head_kv + ih);
            }
            for (int32_t ih = 0; ih < n_head_kv; ++ih) {
                const int32_t row = to[il].empty() ? from : to[il][ih];
                any |= row != from;
                data.push_back(row * n_head_kv + ih);
            }
        }
        if (!any) {
            return true;
        }
        ggml_backend_tensor_set(rows, data.data(), 0, ggml_nbytes(rows));
        return ggml_backend_graph_compute(backend.get(), graph) == GGML_STATUS_SUCCESS;
    }

  private:
    // row r of head h of the stream is row r*n_head_kv + h
    void add(ggml_tensor * t, uint32_t strm, size_t i) {
        ggml_tensor * heads = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, t->nb[1] / n_head_kv / sizeof(float), n_head_kv * t->ne[1]);
        ggml_backend_tensor_alloc(t->buffer, heads, (uint8_t *) t->data + strm * t->nb[2]);
        ggml_tensor * from = ggml_view_1d(ctx.get(), rows, n_head_kv, i * rows->nb[2]);
        ggml_tensor * to   = ggml_view_1d(ctx.get(), rows, n_head_kv, i * rows->nb[2] + rows->nb[1]);
        ggml_build_forward_expand(graph, ggml_set_rows(ctx.get(), heads, ggml_get_rows(ctx.get(), heads, from), to));
    }

    const std::vector<int32_t> layers;
    const int32_t              n_head_kv;
    ggml_backend_ptr           backend;
    ggml_context_ptr           ctx;
    ggml_gallocr_ptr           alloc;
    ggml_cgraph *              graph;
    ggml_tensor *              rows;  // i32 [n_head_kv, {from, to}, layers]
};

// heads of whole floats, in layers that lie on one device
static bool fits_graph(const kv_view & kv, int32_t il) {
    for (const ggml_tensor * t : { kv.k(il), kv.v(il) }) {
        if (t->nb[1] % (kv.shape.n_head_kv * sizeof(float)) != 0) {
            return false;
        }
    }
    return device_of(kv.k(il)) && device_of(kv.k(il)) == device_of(kv.v(il));
}

head_moves::head_moves(const kv_view & kv) : kv(kv) {
    for (int32_t il = 0; il < kv.shape.n_layer; ++il) {
        if (fits_graph(kv, il)) {
            layers_of[device_of(kv.k(il))].push_back(il);
        } else {
            by_copy.push_back(il);
        }
    }
}

head_moves::~head_moves() = default;

void head_moves::run(uint32_t strm, int32_t from, const std::vector<std::vector<int32_t>> & to) {
    for (const int32_t il : by_copy) {
        if (std::any_of(to[il].begin(), to[il].end(), [&](int32_t row) { return row != from; })) {
            layer_of(kv, il, strm).move_heads(from, to[il]);
        }
    }
    for (const auto & [dev, layers] : layers_of) {
        auto & d = devices[{ dev, strm }];
        if (!d) {
            d = std::make_unique<device>(kv, dev, layers, strm);
        }
        if (!d->run(from, to)) {
            throw std::runtime_error("[elastic] a device failed to move rows of K and V");
        }
    }
}

}  // namespace elastic
