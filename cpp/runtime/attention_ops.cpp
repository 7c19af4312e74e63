#include "runtime/attention_ops.h"

#include "ggml-cpp.h"
#include "llama-batch.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <cstdlib>
#include <string>

namespace elastic {

//
// which way
//

const char * name_of(attention_way way) {
    switch (way) {
        case attention_way::own_op:
            return "own op";
        case attention_way::heads:
            return "fused op, a mask per head";
        case attention_way::streams:
            return "fused op, a head as a stream";
        case attention_way::plain:
            break;
    }
    return "plain ops";
}

// a token's attention as the way would ask for it
static bool supports_fused(const kv_view & kv, int32_t il, bool as_streams) {
    ggml_init_params params = { 8 * ggml_tensor_overhead(), nullptr, true };
    ggml_context_ptr ctx(ggml_init(params));

    const auto &  shape = kv.shape;
    const int64_t n_kv  = 256;
    const int64_t n_gqa = shape.n_head / shape.n_head_kv;
    const int64_t n_h   = as_streams ? n_gqa : shape.n_head;
    const int64_t n_s   = as_streams ? shape.n_head_kv : 1;
    ggml_tensor * k     = kv.k(il);
    auto *        q     = ggml_new_tensor_4d(ctx.get(), GGML_TYPE_F32, shape.n_embd_head_k, 1, n_h, n_s);
    auto *        keys  = ggml_new_tensor_4d(ctx.get(), k->type, shape.n_embd_head_k, n_kv, shape.n_head_kv / n_s, n_s);
    auto *        vals  = ggml_new_tensor_4d(ctx.get(), kv.v(il)->type, shape.n_embd_head_v, n_kv, shape.n_head_kv / n_s, n_s);
    auto *        mask  = ggml_new_tensor_4d(ctx.get(), GGML_TYPE_F16, n_kv, 1, as_streams ? 1 : n_h, n_s);
    auto *        op    = ggml_flash_attn_ext(ctx.get(), q, keys, vals, mask, 1.0f, 0.0f, 0.0f);

    ggml_backend_dev_t dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(k->buffer));
    return !dev || ggml_backend_dev_supports_op(dev, op);
}

attention_way find_way(const kv_view & kv, int32_t il) {
    const char *      value = std::getenv("ELASTIC_ATTENTION");
    const std::string wanted(value ? value : "");

    const bool on_host = ggml_backend_buffer_is_host(kv.k(il)->buffer) && ggml_backend_buffer_is_host(kv.v(il)->buffer);
    if (on_host && wanted != "graph" && wanted != "streams" && wanted != "plain") {
        return attention_way::own_op;
    }
    if (wanted == "plain") {
        return attention_way::plain;
    }
    if (wanted != "streams" && supports_fused(kv, il, false)) {
        return attention_way::heads;
    }
    return supports_fused(kv, il, true) ? attention_way::streams : attention_way::plain;
}

//
// sums beside
//

float soft_cap_of(const llm_graph_context & graph) {
    return graph.hparams.attn_soft_cap ? graph.hparams.f_attn_logit_softcapping : 0.0f;
}

// Logits as the fused op has them. A soft cap bounds them after they are scaled, and then nothing is left to scale.
static ggml_tensor * scaled(const attention_inputs & in, ggml_tensor * kq) {
    const float cap = soft_cap_of(in.graph);
    if (cap == 0.0f) {
        return kq;
    }
    kq = ggml_tanh(in.graph.ctx0, ggml_scale(in.graph.ctx0, kq, in.kq_scale / cap));
    return ggml_scale(in.graph.ctx0, kq, cap);
}

static float softmax_scale(const attention_inputs & in) {
    return soft_cap_of(in.graph) != 0.0f ? 1.0f : in.kq_scale;
}

// sinks are a part of the denominator
static ggml_tensor * softmax(const attention_inputs & in, ggml_tensor * kq, ggml_tensor * mask) {
    kq = ggml_soft_max_ext(in.graph.ctx0, kq, mask, softmax_scale(in), in.graph.hparams.f_max_alibi_bias);
    ggml_soft_max_add_sinks(kq, in.sinks);
    return kq;
}

// [n_kv, n_sums, n_head, n_stream] of the attention [n_kv, n_tokens, n_head, n_stream]. Not by ggml_out_prod, which Metal does not have
static ggml_tensor * sums_of(ggml_context * ctx, ggml_tensor * kq, ggml_tensor * weights) {
    if (kq->ne[1] > 1) {
        return ggml_mul_mat(ctx, ggml_cont(ctx, ggml_transpose(ctx, kq)), weights);
    }
    if (weights->ne[1] > 1) {
        kq = ggml_repeat_4d(ctx, kq, kq->ne[0], weights->ne[1], kq->ne[2], kq->ne[3]);
    }
    return ggml_mul(ctx, kq, weights);
}

// K times Q, f32 [n_kv, n_tokens, n_head, n_stream]. Heads of a cell are neighbours, and not every backend (Vulkan) multiplies
// quantized rows that lie so; without the cast K would go through the CPU.
static ggml_tensor * products(const attention_inputs & in, ggml_tensor * k) {
    ggml_context *           ctx = in.graph.ctx0;
    ggml_tensor *            kq  = ggml_mul_mat(ctx, k, in.q_perm);
    const ggml_tensor *      t   = in.k->view_src ? in.k->view_src : in.k;
    const ggml_backend_dev_t dev = t->buffer ? ggml_backend_buft_get_device(ggml_backend_buffer_get_type(t->buffer)) : nullptr;
    if (dev && ggml_is_quantized(k->type) && !ggml_backend_dev_supports_op(dev, kq)) {
        kq = ggml_mul_mat(ctx, ggml_cast(ctx, k, GGML_TYPE_F32), in.q_perm);
    }
    ggml_prec_set_acc(kq, GGML_PREC_F32);
    return kq;
}

// as the fused op computes it
static ggml_tensor * sums_beside(const attention_inputs & in, ggml_tensor * mask, ggml_tensor * weights) {
    ggml_context * ctx = in.graph.ctx0;
    ggml_tensor *  k   = in.k_perm->type == GGML_TYPE_F32 ? ggml_cast(ctx, in.k_perm, GGML_TYPE_F16) : in.k_perm;
    ggml_tensor *  kq  = softmax(in, scaled(in, products(in, k)), mask);
    in.graph.cb(kq, "attn_beside", in.il);
    return sums_of(ctx, kq, weights);
}

//
// the ways
//

// One mask per KV head, f16 [n_kv, n_tokens, n_head_kv, n_stream]. In f32 between, since Metal adds equal types only
static ggml_tensor * mask_per_kv_head(const attention_inputs & in) {
    ggml_context * ctx  = in.graph.ctx0;
    ggml_tensor *  mask = ggml_cast(ctx, in.kq_mask, GGML_TYPE_F32);
    mask                = ggml_repeat_4d(ctx, mask, mask->ne[0], mask->ne[1], in.bias->ne[2], mask->ne[3]);
    mask                = ggml_cast(ctx, ggml_add(ctx, mask, in.bias), GGML_TYPE_F16);
    in.graph.cb(mask, "kq_mask_bias", in.il);
    return mask;
}

// of each query head; the query heads of a KV head are neighbours
static ggml_tensor * mask_per_head(const attention_inputs & in, ggml_tensor * of_kv_heads) {
    ggml_context * ctx   = in.graph.ctx0;
    const int64_t  n_kv  = of_kv_heads->ne[0];
    const int64_t  n_q   = of_kv_heads->ne[1];
    const int64_t  n_gqa = in.q_perm->ne[2] / of_kv_heads->ne[2];
    if (n_gqa == 1) {
        return of_kv_heads;
    }
    ggml_tensor * mask = ggml_reshape_4d(ctx, of_kv_heads, n_kv * n_q, 1, of_kv_heads->ne[2], of_kv_heads->ne[3]);
    mask               = ggml_repeat_4d(ctx, mask, mask->ne[0], n_gqa, mask->ne[2], mask->ne[3]);
    return ggml_reshape_4d(ctx, mask, n_kv, n_q, in.q_perm->ne[2], mask->ne[3]);
}

static ggml_tensor * by_heads(const attention_inputs & in, ggml_tensor * weights, ggml_tensor *& sums) {
    ggml_tensor * mask = in.bias ? mask_per_head(in, mask_per_kv_head(in)) : in.kq_mask;
    if (weights) {
        sums = sums_beside(in, mask, weights);
    }
    return in.graph.build_attn_mha(in.q, in.k, in.v, nullptr, mask, in.sinks, nullptr, 0, in.kq_scale, in.il);
}

// K or V [d, n_head_kv, n_kv, n_stream] of one stream as [d, n_kv, 1, n_head_kv], where it lies
static ggml_tensor * heads_as_streams(ggml_context * ctx, ggml_tensor * t, int64_t s) {
    ggml_tensor * res = ggml_view_4d(ctx, t, t->ne[0], t->ne[2], 1, t->ne[1], t->nb[2], t->nb[1], t->nb[1], s * t->nb[3]);
    return res->type == GGML_TYPE_F32 ? ggml_cast(ctx, res, GGML_TYPE_F16) : res;
}

static ggml_tensor * by_streams(const attention_inputs & in, ggml_tensor * weights, ggml_tensor *& sums) {
    ggml_context * ctx       = in.graph.ctx0;
    const int64_t  n_stream  = in.k->ne[3];
    const int64_t  n_head_kv = in.k->ne[1];
    const int64_t  n_gqa     = in.q->ne[1] / n_head_kv;
    const int64_t  n_q       = in.q->ne[2] / n_stream;
    ggml_tensor *  masks     = mask_per_kv_head(in);
    if (weights) {
        sums = sums_beside(in, mask_per_head(in, masks), weights);
    }
    ggml_tensor * res = nullptr;
    for (int64_t s = 0; s < n_stream; ++s) {
        const auto *  q_all = in.q;
        ggml_tensor * q     = ggml_view_4d(ctx, in.q, q_all->ne[0], n_q, n_gqa, n_head_kv, q_all->nb[2], q_all->nb[1], q_all->nb[1] * n_gqa,
                                           s * n_q * q_all->nb[2]);
        ggml_tensor * mask =
            ggml_view_4d(ctx, masks, masks->ne[0], n_q, 1, n_head_kv, masks->nb[1], masks->nb[2], masks->nb[2], s * masks->nb[3]);
        ggml_tensor * cur = ggml_flash_attn_ext(ctx, q, heads_as_streams(ctx, in.k, s), heads_as_streams(ctx, in.v, s), mask, in.kq_scale,
                                                in.graph.hparams.f_max_alibi_bias, soft_cap_of(in.graph));
        ggml_prec_set_acc(cur, GGML_PREC_F32);
        in.graph.cb(cur, "attn_streams", in.il);
        if (n_q > 1) {  // [d, n_gqa, n_q, n_head_kv]
            cur = ggml_cont(ctx, ggml_permute(ctx, cur, 0, 1, 3, 2));
        }
        cur = ggml_reshape_2d(ctx, cur, in.v->ne[0] * in.q->ne[1], n_q);
        res = res ? ggml_concat(ctx, res, cur, 1) : cur;
    }
    return res;
}

static ggml_tensor * by_plain_ops(const attention_inputs & in, ggml_tensor * weights, ggml_tensor *& sums) {
    const auto &   graph = in.graph;
    ggml_context * ctx   = graph.ctx0;
    ggml_tensor *  kq    = scaled(in, products(in, in.k_perm));
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
    if (weights) {
        sums = sums_of(ctx, kq, weights);
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

static ggml_tensor * at_once(const attention_inputs & in, attention_way way, ggml_tensor * weights, ggml_tensor *& sums) {
    if (in.kq_b || (in.bias && (way == attention_way::plain || (way == attention_way::streams && in.sinks)))) {
        return by_plain_ops(in, weights, sums);
    }
    return in.bias && way == attention_way::streams ? by_streams(in, weights, sums) : by_heads(in, weights, sums);
}

//
// in slices of the queries, so that what lies between the ops stays small
//

static constexpr int64_t N_BETWEEN = 16 * 1024 * 1024;  // numbers
static constexpr int64_t N_LEAST   = 32;                // queries

static int64_t queries_of_slice(int64_t n_kv, int64_t n_head) {
    return std::max(N_LEAST, N_BETWEEN / (n_kv * n_head));
}

// by_streams has most of them: fewer than 48 for a slice, and fewer than 16 for each stream
int64_t n_attention_nodes(int64_t n_tokens, const kv_shape & shape) {
    const int64_t n_queries = queries_of_slice(shape.kv_size, shape.n_head);
    return 48 * ((n_tokens + n_queries - 1) / n_queries) + 16 * shape.n_stream;
}

static ggml_tensor * slice(ggml_context * ctx, ggml_tensor * t, int dim, int64_t i, int64_t n) {
    int64_t ne[4] = { t->ne[0], t->ne[1], t->ne[2], t->ne[3] };
    ne[dim]       = n;
    return ggml_view_4d(ctx, t, ne[0], ne[1], ne[2], ne[3], t->nb[1], t->nb[2], t->nb[3], i * t->nb[dim]);
}

ggml_tensor * attention_of_ops(const attention_inputs & in, attention_way way, ggml_tensor * weights, ggml_tensor *& sums) {
    const int64_t n_q = in.q_perm->ne[1];
    const int64_t n   = queries_of_slice(in.k_perm->ne[1], in.q_perm->ne[2]);
    if (n_q <= n || in.kq_b || in.k->ne[3] > 1 || (!weights && !in.bias)) {
        return at_once(in, way, weights, sums);
    }
    ggml_context * ctx = in.graph.ctx0;
    ggml_tensor *  res = nullptr;
    for (int64_t i = 0; i < n_q; i += n) {
        const int64_t    n_i  = std::min(n, n_q - i);
        attention_inputs part = in;
        part.q                = slice(ctx, in.q, 2, i, n_i);
        part.q_perm           = slice(ctx, in.q_perm, 1, i, n_i);
        part.kq_mask          = ggml_view_4d(ctx, in.kq_mask, in.kq_mask->ne[0], n_i, 1, 1, in.kq_mask->nb[1], in.kq_mask->nb[1] * n_i,
                                             in.kq_mask->nb[1] * n_i, i * in.kq_mask->nb[1]);
        ggml_tensor * sum     = nullptr;
        ggml_tensor * cur     = at_once(part, way, weights ? slice(ctx, weights, 0, i, n_i) : nullptr, sum);
        res                   = res ? ggml_concat(ctx, res, cur, 1) : cur;
        sums                  = sums && sum ? ggml_add(ctx, sums, sum) : sum;
        ggml_build_forward_expand(in.graph.gf, res);  // one slice after the other
        if (sums) {
            ggml_build_forward_expand(in.graph.gf, sums);
        }
    }
    return res;
}

}  // namespace elastic
