#include "runtime/attention_graph.h"

#include "core/statistics.h"
#include "runtime/attention_op.h"
#include "runtime/attention_ops.h"

#include "llama-batch.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <cmath>
#include <deque>

namespace elastic {

// of one layer  [n_stream][n_head][n_rows][n_kv]
struct attention_graph::layer_sums {
    int32_t             il;        // of the cache
    int32_t             il_model;  // others may use K and V of the same layer
    int64_t             n_kv;
    int64_t             n_rows;
    int64_t             n_head;
    int64_t             n_stream;
    ggml_tensor *       tensor = nullptr;  // of llama.cpp's ops
    bool                packed = false;    // copied to device_sums
    attention_op_params op     = {};       // of ours, which says where they are

    size_t n() const { return n_kv * n_rows * n_head * n_stream; }
};

// what one graph was built with, and its sums
class graph_sums : public llm_graph_input_i {
  public:
    graph_sums(attention_graph & owner, const llm_graph_result * graph, bool wanted, bool has_bias)
        : wanted(wanted), has_bias(has_bias), version(owner.on_device.version()), owner(owner), graph(graph), graphs(owner.graphs) {
        (*graphs)[graph] = this;
    }
    ~graph_sums() override {
        const auto it = graphs->find(graph);
        if (it != graphs->end() && it->second == this) {
            graphs->erase(it);
        }
    }

    void set_input(const llama_ubatch * ubatch) override {
        owner.parts.bias.upload();
        for (const bool by_sum : { false, true }) {
            if (ggml_tensor * t = weights[by_sum]) {
                std::vector<float> data(ggml_nelements(t));
                owner.set_weights(data.data(), *ubatch, t->ne[2], t->ne[3], by_sum);
                ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t));
            }
        }
        size_t n = 0;
        for (const auto & layer : layers) {
            n += layer.tensor ? 0 : layer.n();
        }
        float * next = n > 0 ? owner.reserve_sums(n) : nullptr;
        for (auto & layer : layers) {
            layer.op.sums = layer.tensor ? nullptr : next;
            next += layer.tensor ? 0 : layer.n();
        }
    }

    bool can_reuse(const llm_graph_params & params) override {
        if (wanted != owner.wants_sums(params.ubatch) || has_bias != owner.has_bias() || version != owner.on_device.version()) {
            return false;
        }
        const ggml_tensor * t = weights[0] ? weights[0] : weights[1];
        return !t || ggml_nelements(t) == owner.n_sums(params.ubatch) * t->ne[2] * (int64_t) params.ubatch.n_tokens;
    }

    const bool    wanted;
    const bool    has_bias;
    uint32_t      version;  // of what its sums are copied to
    // f32 [n_sums, n_tokens / n_stream, n_head, n_stream] for our op; with the first two the other way round for llama.cpp's
    ggml_tensor * weights[2] = { nullptr, nullptr };

    std::deque<attention_graph::layer_sums> layers;  // which nodes of the graph point to

  private:
    attention_graph &                          owner;
    const llm_graph_result *                   graph;
    std::shared_ptr<attention_graph::registry> graphs;
};

attention_graph::attention_graph(cache_parts & parts, const prompt_logits & logits) : parts(parts), logits(logits), on_device(parts.kv) {
    for (int32_t il = 0; il < parts.kv.shape.n_layer; ++il) {
        ways.push_back(find_way(parts.kv, il));
    }
    for (size_t il = 0; il < parts.kv.shape.owners.size(); ++il) {
        const int32_t owner = parts.kv.shape.owners[il];
        if (owner >= 0 && ways[owner] != attention_way::own_op) {
            on_device.use((int32_t) il);
        }
    }
    own_op = std::all_of(ways.begin(), ways.end(), [](attention_way way) { return way == attention_way::own_op; });
}

//
// what is wanted
//

bool attention_graph::any_scored(const llama_ubatch & ubatch) const {
    return std::any_of(ubatch.seq_id_unq, ubatch.seq_id_unq + ubatch.n_seqs_unq, [&](llama_seq_id id) { return parts.seqs.is_scored(id); });
}

bool attention_graph::wants_sums(const llama_ubatch & ubatch) const {
    if (!parts.active || !parts.scores.needs.sum) {
        return false;
    }
    // the largest graph is reserved between batches; and one that stays the same is not built anew, but where attention comes from
    // llama.cpp's fused op, sums are not free
    const bool always = own_op && parts.cfg.pol.scores_generation();
    return always || !logits.in_batch() || any_scored(ubatch);
}

// an image's patches look at each other, so they say nothing of what was asked
bool attention_graph::decays(const llama_ubatch & ubatch) const {
    return parts.scores.has_decayed() && ubatch.token;
}

uint32_t attention_graph::n_sums(const llama_ubatch & ubatch) const {
    return 1 + (decays(ubatch) ? 1 : 0) + parts.windows.n_window;
}

// fn(each sequence whose window the token's query is a part of)
template <typename F> void attention_graph::for_each_window(const llama_ubatch & ubatch, int64_t i, F fn) const {
    for (int32_t j = 0; parts.windows.any() && j < ubatch.n_seq_id[i]; ++j) {
        if (parts.seqs.is_prompt(ubatch.seq_id[i][j])) {
            fn(ubatch.seq_id[i][j]);
        }
    }
}

void attention_graph::set_weights(float * dst, const llama_ubatch & ubatch, int64_t n_head, int64_t n_stream, bool by_sum) const {
    const int64_t n_tps  = ubatch.n_tokens / n_stream;
    const int64_t n_rows = n_sums(ubatch);

    for (int64_t s = 0; s < n_stream; ++s) {
        std::vector<float> w(n_tps * n_rows, 0.0f);  // [n_tps][n_rows]

        std::map<llama_seq_id, float>   decayed;
        std::map<llama_seq_id, int32_t> n_later;
        for (int64_t i = n_tps - 1; i >= 0; --i) {
            const llama_seq_id seq_id = ubatch.seq_id[s * n_tps + i][0];
            // sequences share a sum, as their queries look at no cells of each other; what they have in common, both look at
            for_each_window(ubatch, s * n_tps + i, [&](llama_seq_id id) {
                const int32_t ago = n_later[id]++;
                if (ago < parts.windows.n_window) {
                    w[i * n_rows + n_rows - 1 - ago] = 1.0f;
                }
            });
            if (!parts.seqs.is_scored(seq_id)) {
                continue;
            }
            float *     row   = w.data() + i * n_rows;
            const float count = (float) parts.seqs.query_count(seq_id);
            row[0]            = count;
            if (decays(ubatch)) {
                float & f = decayed.emplace(seq_id, 1.0f).first->second;
                row[1]    = f * count;
                f *= parts.scores.needs.decay;
            }
        }
        if (by_sum) {
            const std::vector<float> of_tokens(w);
            for (int64_t i = 0; i < n_tps * n_rows; ++i) {
                w[i % n_rows * n_tps + i / n_rows] = of_tokens[i];
            }
        }
        for (int64_t h = 0; h < n_head; ++h) {
            std::copy(w.begin(), w.end(), dst + (s * n_head + h) * n_tps * n_rows);
        }
    }
}

//
// building
//

graph_sums & attention_graph::sums_of(const llm_graph_context & graph) {
    const auto it = graphs->find(graph.res);
    if (it != graphs->end()) {
        return *it->second;
    }
    auto   sums = std::make_unique<graph_sums>(*this, graph.res, wants_sums(graph.ubatch), has_bias());
    auto & res  = *sums;
    graph.res->add_input(std::move(sums));
    return res;
}

// Of one token of each stream they are copied to one place for all layers. Not in the largest graph, which is reserved between batches.
void attention_graph::add_sums(const llm_graph_context & graph, graph_sums & sums, ggml_tensor * t, int32_t il, int32_t il_cache) {
    graph.cb(t, "attn_sums", il);
    sums.layers.push_back({ il_cache, il, t->ne[0], t->ne[1], t->ne[2], t->ne[3], t });
    if (ways[il_cache] != attention_way::own_op && logits.in_batch() && sums.weights[1]->ne[0] == 1) {
        on_device.reserve(ggml_nelements(t));
        sums.version              = on_device.version();
        sums.layers.back().packed = true;
        t                         = ggml_cpy(graph.ctx0, t, on_device.place(graph.ctx0, il, ggml_nelements(t)));
    } else {
        ggml_set_output(t);
    }
    ggml_build_forward_expand(graph.gf, t);
}

static uint32_t first_stream(const llm_graph_context & graph) {
    return memory_parts::attention_of(*graph.mctx).get_slot_info().s0;
}

ggml_tensor * attention_graph::build(const llm_graph_context & graph, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_b,
                                     ggml_tensor * kq_mask, ggml_tensor * sinks, float kq_scale, int32_t il) {
    const int32_t il_cache = parts.kv.shape.index_of(il);
    if (!parts.active || il_cache < 0 || in_ops) {
        return nullptr;
    }
    graph_sums & sums = sums_of(graph);
    if (!sums.wanted && !sums.has_bias) {
        return nullptr;
    }

    ggml_context * ctx      = graph.ctx0;
    const int64_t  n_stream = k->ne[3];
    ggml_tensor *  q_split =
        ggml_view_4d(ctx, q, q->ne[0], q->ne[1], q->ne[2] / n_stream, n_stream, q->nb[1], q->nb[2], q->nb[2] * (q->ne[2] / n_stream), 0);
    ggml_tensor * q_perm = ggml_permute(ctx, q_split, 0, 2, 1, 3);
    ggml_tensor * k_perm = ggml_permute(ctx, k, 0, 2, 1, 3);
    ggml_tensor * v_perm = ggml_permute(ctx, v, 0, 2, 1, 3);
    ggml_tensor * bias   = nullptr;
    if (sums.has_bias) {
        ggml_tensor * b = parts.bias.tensor(il_cache);
        bias = ggml_view_4d(ctx, b, k->ne[2], 1, b->ne[1], n_stream, b->nb[1], b->nb[1], b->nb[2], b->nb[2] * first_stream(graph));
    }
    const attention_inputs in = { graph, il, q, k, v, q_perm, k_perm, v_perm, kq_b, kq_mask, sinks, bias, kq_scale };

    const attention_way way = ways[il_cache];
    ggml_tensor *       res;
    if (way == attention_way::own_op && sums.wanted && !kq_b) {
        res = build_with_op(in, il_cache, sums);
    } else {
        ggml_tensor * w   = sums.wanted ? weights_of(graph, sums, q_perm, true) : nullptr;
        ggml_tensor * sum = nullptr;
        in_ops            = true;
        res               = attention_of_ops(in, way, w, sum);
        in_ops            = false;
        if (sum) {
            add_sums(graph, sums, sum, il, il_cache);
        }
    }
    ggml_build_forward_expand(graph.gf, res);
    return res;
}

// q: permuted, as for ggml_flash_attn_ext
ggml_tensor * attention_graph::weights_of(const llm_graph_context & graph, graph_sums & sums, const ggml_tensor * q, bool by_sum) const {
    ggml_tensor *& res = sums.weights[by_sum];
    if (!res) {
        const int64_t n = n_sums(graph.ubatch);
        res             = ggml_new_tensor_4d(graph.ctx0, GGML_TYPE_F32, by_sum ? q->ne[1] : n, by_sum ? n : q->ne[1], q->ne[2], q->ne[3]);
        ggml_set_input(res);
        ggml_set_name(res, by_sum ? "attn_sum_weights_by_sum" : "attn_sum_weights");
    }
    return res;
}

ggml_tensor * attention_graph::build_with_op(const attention_inputs & in, int32_t il_cache, graph_sums & sums) {
    ggml_tensor * w = weights_of(in.graph, sums, in.q_perm, false);

    sums.layers.push_back({ il_cache, in.il, in.k_perm->ne[1], w->ne[0], w->ne[2], w->ne[3] });
    auto & op   = sums.layers.back().op;
    op.scale    = in.kq_scale;
    op.soft_cap = soft_cap_of(in.graph);
    return attention_op(in.graph.ctx0, in.q_perm, in.k_perm, in.v_perm, in.kq_mask, w, in.bias, in.sinks, op);
}

//
// after it was computed
//

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
        for_each_window(ubatch, i, [&](llama_seq_id id) { n_queries[id]++; });
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
