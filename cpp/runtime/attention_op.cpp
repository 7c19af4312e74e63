#include "runtime/attention_op.h"

#include "kernels/attention_prefill.h"

#include <algorithm>

namespace elastic {

// K or V of one stream in a view that is permuted as for ggml_flash_attn_ext
static kv_rows rows_of(const ggml_tensor * t, int64_t strm) {
    kv_rows res;
    res.type        = t->type;
    res.data        = (uint8_t *) t->data + strm * t->nb[3];
    res.n_head_kv   = (int32_t) t->ne[2];
    res.n_embd_head = (int32_t) t->ne[0];
    res.n_rows      = t->ne[1];
    res.row_bytes   = (int64_t) t->nb[1];
    return res;
}

// sources: q, k, v, mask, weights, bias and sinks if there are some. Threads share the heads of all streams
static void compute(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const ggml_tensor * q       = dst->src[0];
    const ggml_tensor * k       = dst->src[1];
    const ggml_tensor * v       = dst->src[2];
    const ggml_tensor * mask    = dst->src[3];
    const ggml_tensor * weights = dst->src[4];
    const ggml_tensor * bias    = dst->src[5] == q ? nullptr : dst->src[5];  // q holds the place of none before sinks
    const ggml_tensor * sinks   = dst->src[6];
    const auto &        params  = *(const attention_op_params *) userdata;

    attention a;
    a.n_q           = (int32_t) q->ne[1];
    a.n_kv          = (int32_t) k->ne[1];
    a.n_head        = (int32_t) q->ne[2];
    a.q_stride      = (int64_t) (q->nb[1] / sizeof(float));
    a.q_stride_head = (int64_t) (q->nb[2] / sizeof(float));
    a.scale         = params.scale;
    a.soft_cap      = params.soft_cap;
    a.mask_type     = mask->type;
    a.mask_stride   = (int64_t) (mask->nb[1] / ggml_type_size(mask->type));
    a.n_sums        = (int32_t) weights->ne[0];

    const int64_t n_stream = q->ne[3];
    const int64_t n_sums   = (int64_t) a.n_head * a.n_sums * a.n_kv;  // of a stream
    const int64_t n_out    = ggml_nelements(dst) / n_stream;
    const int64_t n_units  = n_stream * a.n_head;

    const int64_t first = n_units * ith / nth;
    const int64_t last  = n_units * (ith + 1) / nth;
    for (int64_t s = first / a.n_head; s * a.n_head < last; ++s) {
        a.q       = (const float *) ((const char *) q->data + s * q->nb[3]);
        a.k       = rows_of(k, s);
        a.v       = rows_of(v, s);
        a.mask    = (const char *) mask->data + s * mask->nb[3];
        a.weights = (const float *) ((const char *) weights->data + s * weights->nb[3]);
        if (bias) {
            a.bias        = (const float *) ((const char *) bias->data + s * bias->nb[3]);
            a.bias_stride = (int64_t) (bias->nb[2] / sizeof(float));
        }
        a.sinks = sinks ? (const float *) sinks->data : nullptr;
        a.out   = (float *) dst->data + s * n_out;
        a.sums  = params.sums + s * n_sums;

        attend(a, (int32_t) (std::max(first, s * a.n_head) - s * a.n_head), (int32_t) (std::min(last, (s + 1) * a.n_head) - s * a.n_head));
    }
}

ggml_tensor * attention_op(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_mask,
                           ggml_tensor * sum_weights, ggml_tensor * bias, ggml_tensor * sinks, attention_op_params & params) {
    ggml_tensor * args[] = { q, k, v, kq_mask, sum_weights, bias ? bias : q, sinks };

    return ggml_custom_4d(ctx, GGML_TYPE_F32, v->ne[0] * q->ne[2], q->ne[1] * q->ne[3], 1, 1, args,
                          sinks  ? 7
                          : bias ? 6
                                 : 5,
                          compute, GGML_N_TASKS_MAX, &params);
}

}  // namespace elastic
