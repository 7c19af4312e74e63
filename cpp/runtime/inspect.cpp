#include "runtime/inspect.h"

#include "runtime/kv_layers.h"

#include "kernels/kv_rows.h"

#include <algorithm>
#include <cstdio>

namespace elastic {

std::vector<cell_info> describe_cells(const cache_parts & parts, llama_seq_id seq_id) {
    const uint32_t strm = parts.kv.stream(seq_id);

    std::vector<cell_info> res;
    for (const int32_t row : parts.kv.rows(seq_id)) {
        res.push_back({ row, parts.kv.pos(strm, row), parts.table.kind(strm, row) });
    }
    return res;
}

elastic_memory describe_memory(const kv_view & kv) {
    elastic_memory res = {};
    std::snprintf(res.kind, sizeof(res.kind), "%s", kv.parts.kind());
    res.n_layer_model = kv.shape.n_layer_model;
    res.n_layer       = kv.shape.n_layer;
    res.cell_bytes    = kv.shape.cell_bytes;
    res.other_bytes   = kv.parts.other_bytes();
    res.other_cells   = kv.parts.other_cells();
    res.recurrent     = kv.parts.recurrent != nullptr;
    return res;
}

static std::vector<float> read_rows(const kv_rows & t, const std::vector<int32_t> & rows) {
    std::vector<float> res(rows.size() * t.n_head_kv * t.n_embd_head);
    std::vector<float> head(rows.size() * t.n_embd_head);
    for (int32_t ih = 0; ih < t.n_head_kv; ++ih) {
        read_f32(t, rows, ih, head.data());
        for (size_t i = 0; i < rows.size(); ++i) {
            std::copy_n(head.data() + i * t.n_embd_head, t.n_embd_head, res.data() + (i * t.n_head_kv + ih) * t.n_embd_head);
        }
    }
    return res;
}

kv_values read_kv(const cache_parts & parts, llama_seq_id seq_id, int32_t il) {
    const auto & shape = parts.kv.shape;
    if (il < 0 || il >= shape.n_layer) {
        throw error("[Session.read_kv] layer: got " + std::to_string(il) + ", expected 0 <= layer < " + std::to_string(shape.n_layer));
    }
    kv_layer layer = layer_of(parts.kv, il, parts.kv.stream(seq_id));
    layer.load(parts.kv.n_used(parts.kv.stream(seq_id)));

    const auto rows = parts.kv.rows(seq_id);
    return { (int32_t) rows.size(), shape.n_head_kv,          shape.n_embd_head_k,
             shape.n_embd_head_v,   read_rows(layer.k, rows), read_rows(layer.v, rows) };
}

head_map counts_of(const cache_parts & parts, llama_seq_id seq_id) {
    return parts.table.counts(parts.kv.stream(seq_id), parts.kv.rows(seq_id));
}

head_map bias_of(const cache_parts & parts, llama_seq_id seq_id) {
    return parts.bias.gather(parts.kv.stream(seq_id), parts.kv.rows(seq_id));
}

cell_importance importance_of(const cache_parts & parts, llama_seq_id seq_id) {
    return parts.scores.gather(parts.kv.stream(seq_id), parts.kv.rows(seq_id));
}

head_map windowed_of(const cache_parts & parts, llama_seq_id seq_id) {
    return parts.windows.sum(seq_id, parts.kv.rows(seq_id));
}

}  // namespace elastic
