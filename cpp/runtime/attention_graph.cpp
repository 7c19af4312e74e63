#include "runtime/attention_graph.h"

#include "core/statistics.h"
#include "runtime/attention_op.h"

#include "ggml-cpp.h"
#include "llama-batch.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <deque>

namespace elastic {

// of one layer  [n_stream][n_head][n_rows][n_kv]
struct attention_graph::layer_sums {
    int32_t             il;  // of the cache
    int64_t             n_kv;
    int64_t             n_rows;
    int64_t             n_head;
    int64_t             n_stream;
    ggml_tensor *       tensor = nullptr;  // of llama.cpp's ops
    attention_op_params op     = {};       // of ours, which says where they are

    size_t n() const { return n_kv * n_rows * n_head * n_stream; }
};

// what one graph was built with, and its sums
class graph_sums : public llm_graph_input_i {
  public:
    graph_sums(attention_graph & owner, const llm_graph_result * graph, bool wanted, bool has_bias)
        : wanted(wanted), has_bias(has_bias), owner(owner), graph(graph), graphs(owner.graphs) {
        (*graphs)[graph] = this;
    }
    ~graph_sums() override {
        const auto it = graphs->find(graph);
        if (it != graphs->end() && it->second == this) {
            graphs->erase(it);
        }
    }

    void set_input(const llama_ubatch * ubatch) override {
        if (weights) {
            std::vector<float> data(ggml_nelements(weights));
            owner.set_weights(data.data(), *ubatch, weights->ne[2], weights->ne[3]);
            ggml_backend_tensor_set(weights, data.data(), 0, ggml_nbytes(weights));
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
        if (wanted != owner.wants_sums(params.ubatch) || has_bias != owner.has_bias()) {
            return false;
        }
        return !weights || (weights->ne[0] == (int64_t) owner.n_sums(params.ubatch) &&
                            weights->ne[1] * weights->ne[3] == (int64_t) params.ubatch.n_tokens);
    }

    const bool    wanted;
    const bool    has_bias;
    ggml_tensor * weights = nullptr;

    std::deque<attention_graph::layer_sums> layers;  // which nodes of the graph point to

  private:
    attention_graph &                          owner;
    const llm_graph_result *                   graph;
    std::shared_ptr<attention_graph::registry> graphs;
};

// of one layer
struct attention_graph::attention_inputs {
    const llm_graph_context & graph;
    int32_t                   il;        // of the model
    int32_t                   il_cache;  // and of the cache
    ggml_tensor *             q;         // as llama.cpp has them
    ggml_tensor *             k;
    ggml_tensor *             v;
    ggml_tensor *             q_perm;  // as for ggml_flash_attn_ext
    ggml_tensor *             k_perm;
    ggml_tensor *             v_perm;
    ggml_tensor *             kq_b;
    ggml_tensor *             kq_mask;
    ggml_tensor *             sinks;
    ggml_tensor *             bias;  // f32 [n_kv, 1, n_head_kv, n_stream], or nullptr
    float                     kq_scale;
};

// CUDA's does not, and what a device does not support goes through the CPU
static bool fused_op_masks_heads(const ggml_tensor * k, const ggml_tensor * v, const kv_shape & shape) {
    ggml_init_params params = { 8 * ggml_tensor_overhead(), nullptr, true };
    ggml_context_ptr ctx(ggml_init(params));

    const int64_t n_kv = 256;
    auto *        q    = ggml_new_tensor_4d(ctx.get(), GGML_TYPE_F32, shape.n_embd_head_k, 1, shape.n_head, 1);
    auto *        keys = ggml_new_tensor_4d(ctx.get(), k->type, shape.n_embd_head_k, n_kv, shape.n_head_kv, 1);
    auto *        vals = ggml_new_tensor_4d(ctx.get(), v->type, shape.n_embd_head_v, n_kv, shape.n_head_kv, 1);
    auto *        mask = ggml_new_tensor_4d(ctx.get(), GGML_TYPE_F16, n_kv, 1, shape.n_head, 1);
    auto *        op   = ggml_flash_attn_ext(ctx.get(), q, keys, vals, mask, 1.0f, 0.0f, 0.0f);

    ggml_backend_dev_t dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(k->buffer));
    return !dev || ggml_backend_dev_supports_op(dev, op);
}

static bool all_mask_heads(const kv_view & kv) {
    for (int32_t il = 0; il < kv.shape.n_layer; ++il) {
        if (!fused_op_masks_heads(kv.k(il), kv.v(il), kv.shape)) {
            return false;
        }
    }
    return true;
}

// For tests: attention as on a device, which has no op of ours ("graph"), or whose fused op takes no mask per head either ("plain").
static std::string attention_switch() {
    const char * value = std::getenv("ELASTIC_ATTENTION");
    return value ? value : "";
}

attention_graph::attention_graph(cache_parts & parts, const prompt_logits & logits)
    : parts(parts), logits(logits), own_op(parts.kv.on_host() && attention_switch() != "graph" && attention_switch() != "plain"),
      masks_heads(attention_switch() != "plain" && all_mask_heads(parts.kv)) {}

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
    return 1 + (decays(ubatch) ? 1 : 0) + parts.scores.needs.n_window;
}

void attention_graph::set_weights(float * dst, const llama_ubatch & ubatch, int64_t n_head, int64_t n_stream) const {
    const int64_t n_tps    = ubatch.n_tokens / n_stream;
    const int64_t n_rows   = n_sums(ubatch);
    const int32_t n_window = parts.scores.needs.n_window;

    for (int64_t s = 0; s < n_stream; ++s) {
        std::vector<float> w(n_tps * n_rows, 0.0f);  // [n_tps][n_rows]

        std::map<llama_seq_id, float> decayed;
        int64_t                       n_later = 0;
        for (int64_t i = n_tps - 1; i >= 0; --i) {
            const llama_seq_id seq_id = ubatch.seq_id[s * n_tps + i][0];
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
            if (n_later < n_window) {
                row[n_rows - 1 - n_later] = 1.0f;
            }
            n_later++;
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

ggml_tensor * attention_graph::build(const llm_graph_context & graph, const llama_kv_cache_context & mctx, ggml_tensor * q, ggml_tensor * k,
                                     ggml_tensor * v, ggml_tensor * kq_b, ggml_tensor * kq_mask, ggml_tensor * sinks, float kq_scale,
                                     int32_t il) {
    const int32_t il_cache = parts.kv.shape.index_of(il);
    if (!parts.active || il_cache < 0) {
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
        bias = ggml_view_4d(ctx, b, k->ne[2], 1, b->ne[1], n_stream, b->nb[1], b->nb[1], b->nb[2], b->nb[2] * mctx.get_slot_info().s0);
    }
    const attention_inputs in = { graph, il, il_cache, q, k, v, q_perm, k_perm, v_perm, kq_b, kq_mask, sinks, bias, kq_scale };

    ggml_tensor * res;
    if (own_op && sums.wanted && !kq_b) {
        res = build_with_op(in, sums);
    } else if (!kq_b && (masks_heads || !bias)) {
        res = build_fused(in, sums);
    } else {
        res = build_plain(in, sums);
    }
    ggml_build_forward_expand(graph.gf, res);
    return res;
}

// q: permuted, as for ggml_flash_attn_ext
ggml_tensor * attention_graph::weights_of(const llm_graph_context & graph, graph_sums & sums, const ggml_tensor * q) const {
    if (!sums.weights) {
        sums.weights = ggml_new_tensor_4d(graph.ctx0, GGML_TYPE_F32, n_sums(graph.ubatch), q->ne[1], q->ne[2], q->ne[3]);
        ggml_set_input(sums.weights);
        ggml_set_name(sums.weights, "attn_sum_weights");
    }
    return sums.weights;
}

static void add_sums(const llm_graph_context & graph, graph_sums & sums, ggml_tensor * t, int32_t il, int32_t il_cache) {
    graph.cb(t, "attn_sums", il);
    ggml_set_output(t);
    sums.layers.push_back({ il_cache, t->ne[0], t->ne[1], t->ne[2], t->ne[3], t });
    ggml_build_forward_expand(graph.gf, t);
}

ggml_tensor * attention_graph::build_with_op(const attention_inputs & in, graph_sums & sums) {
    ggml_tensor * w = weights_of(in.graph, sums, in.q_perm);

    sums.layers.push_back({ in.il_cache, in.k_perm->ne[1], w->ne[0], w->ne[2], w->ne[3] });
    auto & op   = sums.layers.back().op;
    op.scale    = in.kq_scale;
    op.soft_cap = in.graph.hparams.attn_soft_cap ? in.graph.hparams.f_attn_logit_softcapping : 0.0f;
    return attention_op(in.graph.ctx0, in.q_perm, in.k_perm, in.v_perm, in.kq_mask, w, in.bias, in.sinks, op);
}

// Logits as the fused op has them. A soft cap bounds them after they are scaled, and then nothing is left to scale.
ggml_tensor * attention_graph::scaled(const attention_inputs & in, ggml_tensor * kq) {
    const auto & hparams = in.graph.hparams;
    if (!hparams.attn_soft_cap) {
        return kq;
    }
    const float cap = hparams.f_attn_logit_softcapping;
    kq              = ggml_tanh(in.graph.ctx0, ggml_scale(in.graph.ctx0, kq, in.kq_scale / cap));
    return ggml_scale(in.graph.ctx0, kq, cap);
}

float attention_graph::softmax_scale(const attention_inputs & in) {
    return in.graph.hparams.attn_soft_cap ? 1.0f : in.kq_scale;
}

// sinks are a part of the denominator
ggml_tensor * attention_graph::softmax(const attention_inputs & in, ggml_tensor * kq, ggml_tensor * mask) {
    kq = ggml_soft_max_ext(in.graph.ctx0, kq, mask, softmax_scale(in), in.graph.hparams.f_max_alibi_bias);
    ggml_soft_max_add_sinks(kq, in.sinks);
    return kq;
}

// the bias is a part of the mask, and the attention that is summed is computed beside the fused op
ggml_tensor * attention_graph::build_fused(const attention_inputs & in, graph_sums & sums) const {
    const auto &   graph = in.graph;
    ggml_context * ctx   = graph.ctx0;
    ggml_tensor *  mask  = in.kq_mask;
    if (in.bias) {
        const int64_t n_head = in.q_perm->ne[2];
        const int64_t n_gqa  = n_head / in.bias->ne[2];
        mask                 = ggml_repeat_4d(ctx, mask, mask->ne[0], mask->ne[1], n_head, mask->ne[3]);
        // the query heads of a KV head are neighbors, so they can share its bias as if they were more tokens
        mask                 = ggml_reshape_4d(ctx, mask, mask->ne[0], mask->ne[1] * n_gqa, in.bias->ne[2], mask->ne[3]);
        mask                 = ggml_add(ctx, mask, in.bias);
        mask                 = ggml_reshape_4d(ctx, mask, mask->ne[0], in.kq_mask->ne[1], n_head, mask->ne[3]);
        graph.cb(mask, "kq_mask_bias", in.il);
    }
    if (sums.wanted) {
        ggml_tensor * k  = in.k_perm->type == GGML_TYPE_F32 ? ggml_cast(ctx, in.k_perm, GGML_TYPE_F16) : in.k_perm;
        ggml_tensor * kq = ggml_mul_mat(ctx, k, in.q_perm);
        ggml_prec_set_acc(kq, GGML_PREC_F32);
        kq = softmax(in, scaled(in, kq), mask);
        graph.cb(kq, "attn_beside", in.il);
        add_sums(graph, sums, ggml_out_prod(ctx, kq, weights_of(graph, sums, kq)), in.il, in.il_cache);
    }
    return graph.build_attn_mha(in.q, in.k, in.v, nullptr, mask, in.sinks, nullptr, 0, in.kq_scale, in.il);
}

// without the fused op, which takes no bias here
ggml_tensor * attention_graph::build_plain(const attention_inputs & in, graph_sums & sums) const {
    const auto &   graph = in.graph;
    ggml_context * ctx   = graph.ctx0;
    ggml_tensor *  kq    = ggml_mul_mat(ctx, in.k_perm, in.q_perm);
    ggml_prec_set_acc(kq, GGML_PREC_F32);
    kq = scaled(in, kq);
    if (in.kq_b) {
        kq = ggml_add(ctx, kq, in.kq_b);
    }
    if (in.bias) {  // the softmax scales what it is given
        const float   scale = softmax_scale(in);
        ggml_tensor * b     = scale == 1.0f ? in.bias : ggml_scale(ctx, ggml_cont(ctx, in.bias), 1.0f / scale);
        const int64_t n_gqa = kq->ne[2] / b->ne[2];
        ggml_tensor * cur   = ggml_reshape_4d(ctx, kq, kq->ne[0], kq->ne[1] * n_gqa, b->ne[2], kq->ne[3]);
        kq                  = ggml_reshape_4d(ctx, ggml_add(ctx, cur, b), kq->ne[0], kq->ne[1], kq->ne[2], kq->ne[3]);
        graph.cb(kq, "kq_plus_bias", in.il);
    }
    kq = softmax(in, kq, in.kq_mask);
    if (sums.wanted) {
        add_sums(graph, sums, ggml_out_prod(ctx, kq, weights_of(graph, sums, kq)), in.il, in.il_cache);
    }
    ggml_tensor * v   = ggml_is_quantized(in.v_perm->type) ? ggml_cast(ctx, in.v_perm, GGML_TYPE_F32) : in.v_perm;
    ggml_tensor * kqv = ggml_mul_mat(ctx, ggml_cont(ctx, ggml_transpose(ctx, v)), kq);
    ggml_tensor * cur = ggml_permute(ctx, kqv, 0, 2, 1, 3);
    cur               = ggml_cont_2d(ctx, cur, cur->ne[0] * cur->ne[1], cur->ne[2] * cur->ne[3]);
    if (!graph.cparams.offload_kqv) {
        ggml_backend_sched_set_tensor_backend(graph.sched, cur, graph.backend_cpu);
    }
    return cur;
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

// rows for the single queries of the window, [n_stream] of each stream
std::vector<int32_t> attention_graph::begin_queries(const llama_ubatch & ubatch, const placed_cells & placed) {
    std::vector<int32_t> res(placed.n_stream, 0);
    for (int32_t s = 0; s < placed.n_stream; ++s) {
        for (int64_t i = 0; i < placed.n_of_stream && res[s] < parts.scores.needs.n_window; ++i) {
            if (is_scored(ubatch, s * placed.n_of_stream + i)) {
                parts.scores.begin_query(placed.strm[s]);
                res[s]++;
            }
        }
    }
    return res;
}

void attention_graph::add_layer(const layer_sums & layer, const llama_ubatch & ubatch, const placed_cells & placed,
                                const std::vector<std::vector<float>> & used, const std::vector<int32_t> & n_queries) {
    std::vector<float>  data;
    const float *       sums = layer.op.sums;
    const ggml_tensor * t    = layer.tensor;
    if (t && ggml_backend_buffer_is_host(t->buffer)) {
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

    for (int32_t s = 0; s < placed.n_stream; ++s) {
        const uint32_t strm = placed.strm[s];
        for (int64_t h = 0; h < n_head; ++h) {
            const float * src = sums + (s * n_head + h) * n_rows * n_kv;
            const int32_t ih  = (int32_t) (h * parts.kv.shape.n_head_kv / n_head);
            const auto    add = [&](int64_t row, float * dst) {
                add_share(dst, src + row * n_kv, used[s].data(), (int32_t) used[s].size(), (int32_t) n_gqa);
            };
            add(0, parts.scores.sum_row(strm, il, ih));
            if (decays(ubatch)) {
                add(1, parts.scores.decayed_row(strm, il, ih));
            }
            for (int32_t ago = 0; ago < n_queries[s]; ++ago) {
                add(n_rows - 1 - ago, parts.scores.query_row(strm, ago, il, ih));
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
    const placed_cells placed  = kv_view::placed(mctx);

    // what earlier queries left decays first
    std::vector<std::vector<float>> used(placed.n_stream);  // up to the last row in use
    for (int32_t s = 0; s < placed.n_stream; ++s) {
        const uint32_t strm = placed.strm[s];
        if (decays(ubatch)) {
            parts.scores.decay(strm, decay_factors(ubatch, strm, (int64_t) s * placed.n_of_stream, placed.n_of_stream));
        }
        for (int32_t i = 0; i < parts.kv.n_used(strm); ++i) {
            used[s].push_back(parts.kv.is_free(strm, i) ? 0.0f : 1.0f);
        }
    }
    const auto n_queries = begin_queries(ubatch, placed);
    for (const auto & layer : it->second->layers) {
        add_layer(layer, ubatch, placed, used, n_queries);
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
