#include "runtime/attention_graph.h"

#include "runtime/attention_op.h"
#include "runtime/attention_ops.h"
#include "runtime/graph_sums.h"

#include "llama-batch.h"
#include "llama-kv-cache.h"

#include <algorithm>

namespace elastic {

static constexpr int64_t N_NODES = 16;  // around the attention of a layer: views, weights, the copy of its sums

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

std::vector<llama_seq_id> attention_graph::windows_of(const llama_ubatch & ubatch, int64_t i) const {
    std::vector<llama_seq_id> res;
    for (int32_t j = 0; parts.windows.any() && j < ubatch.n_seq_id[i]; ++j) {
        if (parts.seqs.is_prompt(ubatch.seq_id[i][j])) {
            res.push_back(ubatch.seq_id[i][j]);
        }
    }
    return res;
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
            for (const llama_seq_id id : windows_of(ubatch, s * n_tps + i)) {
                const int32_t ago = n_later[id]++;
                if (ago < parts.windows.n_window) {
                    w[i * n_rows + n_rows - 1 - ago] = 1.0f;
                }
            }
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

// our op takes a whole ubatch at once
int64_t attention_graph::n_nodes(int64_t n_tokens) const {
    int64_t res = 0;
    for (const int32_t owner : parts.kv.shape.owners) {
        if (owner >= 0) {
            res += N_NODES + n_attention_nodes(ways[owner] == attention_way::own_op ? 1 : n_tokens, parts.kv.shape);
        }
    }
    return res;
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

}  // namespace elastic
