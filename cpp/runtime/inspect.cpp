// What tests and pictures want to see of a sequence; nothing here is on the way of decode.

#include "core/rows.h"
#include "runtime/elastic_cache.h"

#include "llama-kv-cache.h"

namespace elastic {

std::vector<cell_info> elastic_cache::describe_cells(llama_seq_id seq_id) const {
    const auto strm = kv.get_stream(seq_id);

    std::vector<cell_info> res;
    for (const auto & [pos, cell] : kv.get_cells(seq_id).seq_pos_get(seq_id)) {
        res.push_back({ (int32_t) cell, pos, store->kind(strm, (int32_t) cell) });
    }
    return res;
}

kv_values elastic_cache::read_kv(llama_seq_id seq_id, int32_t il) const {
    if (il < 0 || il >= shape.n_layer) {
        throw error("[Session.read_kv] layer: got " + std::to_string(il) + ", expected 0 <= layer < " + std::to_string(shape.n_layer));
    }
    kv_layer_access layer(kv, shape, il, kv.get_stream(seq_id));
    layer.load_k();
    layer.load_v();

    const auto rows = logical_cells(seq_id);
    const auto read = [&](const kv_rows & t) {
        std::vector<float> res(rows.size() * t.n_head_kv * t.n_embd_head);
        std::vector<float> head(rows.size() * t.n_embd_head);
        for (int32_t ih = 0; ih < t.n_head_kv; ++ih) {
            read_f32(t, rows, ih, head.data());
            for (size_t i = 0; i < rows.size(); ++i) {
                std::copy_n(head.data() + i * t.n_embd_head, t.n_embd_head, res.data() + (i * t.n_head_kv + ih) * t.n_embd_head);
            }
        }
        return res;
    };
    return { (int32_t) rows.size(), shape.n_head_kv, shape.n_embd_head_k, shape.n_embd_head_v, read(layer.k), read(layer.v) };
}

}  // namespace elastic
