// What comes of the sums of a graph that was computed.

#include "core/statistics.h"
#include "runtime/graph_sums.h"

#include "llama-batch.h"

#include <algorithm>
#include <cmath>

namespace elastic {

// numbers that stay reserved between the ubatches of a prompt
static constexpr size_t N_BUFFER = 2 * 1024 * 1024;

// not written here, so that memory is taken only for what is
float * attention_graph::reserve_sums(size_t n) {
    if (n > n_buffer) {
        buffer.reset();
        buffer.reset(new float[n]);
        n_buffer = n;
    }
    return buffer.get();
}

// of each cell, by as many steps as its sequence has queries among [first, first + n)
std::vector<float> attention_graph::decay_factors(const llama_ubatch & ubatch, uint32_t strm, int64_t first, int64_t n) const {
    std::map<llama_seq_id, int32_t> n_later;
    for (int64_t i = first; i < first + n; ++i) {
        if (is_scored(ubatch, i)) {
            n_later[ubatch.seq_id[i][0]] += parts.seqs.query_count(ubatch.seq_id[i][0]);
        }
    }
    std::vector<float> res(parts.kv.n_used(strm), 1.0f);
    for (const auto & [seq_id, count] : n_later) {
        const float factor = std::pow(parts.scores.needs.decay, (float) count);
        for (const int32_t row : parts.kv.rows(seq_id)) {
            res[row] *= factor;
        }
    }
    return res;
}

// room for the ubatch's queries of a stream, [first, first + n), in the windows of their sequences
std::vector<attention_graph::window_part> attention_graph::begin_queries(const llama_ubatch & ubatch, int64_t first, int64_t n) {
    std::map<llama_seq_id, int32_t> n_queries;
    for (int64_t i = first; i < first + n; ++i) {
        for (const llama_seq_id id : windows_of(ubatch, i)) {
            n_queries[id]++;
        }
    }
    std::vector<window_part> res;
    for (const auto & [seq_id, count] : n_queries) {
        const auto    rows  = parts.kv.rows(seq_id);
        const auto    range = std::minmax_element(rows.begin(), rows.end());
        const int32_t begin = *range.first;
        window_part   part  = { seq_id, std::min(count, parts.windows.n_window), begin, {} };
        part.held.resize(*range.second - begin + 1);
        for (const int32_t row : rows) {
            part.held[row - begin] = 1.0f;
        }
        for (int32_t i = 0; i < part.n_queries; ++i) {
            parts.windows.begin_query(seq_id);
        }
        res.push_back(std::move(part));
    }
    return res;
}

void attention_graph::add_layer(const layer_sums & layer, const llama_ubatch & ubatch, const std::vector<stream_part> & streams) {
    std::vector<float>  data;
    const float *       sums = layer.op.sums;
    const ggml_tensor * t    = layer.tensor;
    if (layer.packed) {
        sums = on_device.of(layer.il_model, (int64_t) layer.n());
    } else if (t && ggml_backend_buffer_is_host(t->buffer)) {
        sums = (const float *) t->data;
    } else if (t) {
        data.resize(layer.n());
        ggml_backend_tensor_get(t, data.data(), 0, ggml_nbytes(t));
        sums = data.data();
    }
    const int32_t il     = layer.il;
    const int64_t n_kv   = layer.n_kv;
    const int64_t n_rows = layer.n_rows;
    const int64_t n_head = layer.n_head;
    const int64_t n_gqa  = n_head / parts.kv.shape.n_head_kv * parts.kv.shape.n_users[il];  // query heads of a KV head

    for (size_t s = 0; s < streams.size(); ++s) {
        const stream_part & part = streams[s];
        for (int64_t h = 0; h < n_head; ++h) {
            const float * src = sums + (s * n_head + h) * n_rows * n_kv;
            const int32_t ih  = (int32_t) (h * parts.kv.shape.n_head_kv / n_head);
            const auto    add = [&](float * dst, int64_t row, int32_t first, const std::vector<float> & cells) {
                add_share(dst + first, src + row * n_kv + first, cells.data(), (int32_t) cells.size(), (int32_t) n_gqa);
            };
            add(parts.scores.sum_row(part.strm, il, ih), 0, 0, part.used);
            if (decays(ubatch)) {
                add(parts.scores.decayed_row(part.strm, il, ih), 1, 0, part.used);
            }
            for (const auto & window : part.windows) {
                for (int32_t ago = 0; ago < window.n_queries; ++ago) {
                    add(parts.windows.row(window.seq_id, ago, il, ih), n_rows - 1 - ago, window.first, window.held);
                }
            }
        }
    }
}

void attention_graph::collect(const llm_graph_result & graph, const llama_ubatch & ubatch, const llama_memory_context_i & mctx) {
    const auto it = graphs->find(&graph);
    if (it == graphs->end() || it->second->layers.empty() || !any_scored(ubatch)) {
        return;
    }
    parts.kv.synchronize();
    const int64_t      t_start = ggml_time_us();
    const placed_cells placed  = placed_in(mctx);

    // what earlier queries left decays first
    std::vector<stream_part> streams;
    for (int32_t s = 0; s < placed.n_stream; ++s) {
        const uint32_t strm  = placed.strm[s];
        const int64_t  first = (int64_t) s * placed.n_of_stream;
        if (decays(ubatch)) {
            parts.scores.decay(strm, decay_factors(ubatch, strm, first, placed.n_of_stream));
        }
        stream_part part = { strm, {}, begin_queries(ubatch, first, placed.n_of_stream) };
        for (int32_t i = 0; i < parts.kv.n_used(strm); ++i) {
            part.used.push_back(parts.kv.is_free(strm, i) ? 0.0f : 1.0f);
        }
        streams.push_back(std::move(part));
    }
    const auto & layers = it->second->layers;
    const auto   packed = std::find_if(layers.begin(), layers.end(), [](const layer_sums & layer) { return layer.packed; });
    if (packed != layers.end()) {
        on_device.fetch((int64_t) packed->n());
    }
    for (const auto & layer : layers) {
        add_layer(layer, ubatch, streams);
    }
    if (n_buffer > N_BUFFER && ubatch.n_tokens > ubatch.n_seqs_unq) {  // of a prompt; what an answer takes stays as it is
        buffer.reset();
        n_buffer = 0;
    }
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        for (int32_t j = 0; j < ubatch.n_seq_id[i]; ++j) {
            if (parts.seqs.is_scored(ubatch.seq_id[i][j])) {
                parts.seqs.scored(ubatch.seq_id[i][j], ubatch.pos[i]);
            }
        }
    }
    parts.stats.t_score_us += ggml_time_us() - t_start;
}

}  // namespace elastic
