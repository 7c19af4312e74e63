#include "runtime/elastic_cache.h"

#include "core/rows.h"
#include "core/score.h"

#include "ggml-cpp.h"
#include "llama-batch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <numeric>
#include <tuple>

namespace elastic {

// rows that must be free at the end before a batch gives them back
static constexpr int32_t N_RELEASE = 256;

config make_config(const elastic_params & params) {
    config cfg;
    cfg.pol  = find_policy(params.policy ? params.policy : "");
    cfg.keep = budget::from_value(params.budget);

    const auto at_least = [](const char * name, int32_t value, int32_t low) {
        if (value < low) {
            throw error("[elastic] " + std::string(name) + ": got " + std::to_string(value) + ", expected >= " + std::to_string(low));
        }
        return value;
    };
    cfg.n_sink    = at_least("n_sink", params.n_sink, 0);
    cfg.offset    = at_least("offset", params.offset, 0);
    cfg.min_cells = at_least("min_cells", params.min_cells, 1);
    cfg.n_threads = at_least("n_threads", params.n_threads, 0);
    cfg.max_cells = at_least("max_cells", params.max_cells, 0);
    cfg.delay     = at_least("delay", params.delay, 0);
    cfg.lookahead = at_least("lookahead", params.lookahead, -1);
    cfg.record    = params.record;

    cfg.overdraft     = at_least("overdraft", params.overdraft, -1);
    cfg.n_checkpoints = at_least("n_checkpoints", params.n_checkpoints, 0);
    if (at_least("n_layer_share", params.n_layer_share, 0) > 0 && !params.layer_share) {
        throw error("[elastic] layer_share: got NULL, expected " + std::to_string(params.n_layer_share) + " values");
    }
    cfg.layer_share.assign(params.layer_share, params.layer_share + params.n_layer_share);

    cfg.release_memory = params.release_memory;

    if (cfg.max_cells > 0 && cfg.max_cells < cfg.n_sink + 2) {
        throw error("[elastic] max_cells: got " + std::to_string(cfg.max_cells) +
                    ", expected at least n_sink + 2 = " + std::to_string(cfg.n_sink + 2) + ", or 0 for no cap");
    }
    if (cfg.max_cells > 0 && cfg.pol.select == select_rule::all) {
        throw error("[elastic] max_cells: got " + std::to_string(cfg.max_cells) + " with the policy " + cfg.pol.name +
                    ", which keeps every cell; choose another policy");
    }
    for (const float x : cfg.layer_share) {
        if (!(x > 0.0f) || std::isinf(x)) {
            throw error("[elastic] layer_share: got " + std::to_string(x) + ", expected finite values > 0");
        }
    }
    if (!cfg.layer_share.empty() && cfg.pol.select != select_rule::cover) {
        throw error("[elastic] layer_share: got it with the policy " + std::string(cfg.pol.name) +
                    ", which keeps as many cells in all layers; choose another policy");
    }
    if (!cfg.layer_share.empty() && cfg.max_cells > 0) {
        throw error("[elastic] layer_share: got it with max_cells = " + std::to_string(cfg.max_cells) +
                    ", under which all layers keep as many cells; choose one of them");
    }
    return cfg;
}

static llama_kv_cache & plain_kv_cache(llama_context & ctx) {
    const auto & model   = ctx.get_model();
    const auto & hparams = model.hparams;

    auto * kv = dynamic_cast<llama_kv_cache *>(ctx.get_memory());
    if (!kv) {
        throw unsupported("[elastic_attach] this model's memory is not a plain KV cache (sliding window, recurrent or "
                          "hybrid models are not supported); run it with the elastic cache off");
    }

    const auto refuse = [](const std::string & what) {
        throw unsupported("[elastic_attach] models with " + what + " are not supported; run this one with the elastic cache off");
    };
    if (hparams.n_pos_per_embd() > 1) {
        refuse("M-RoPE positions");
    }
    if (!hparams.causal_attn) {
        refuse("attention that is not causal (embedding models)");
    }
    if (llama_model_has_encoder(&model)) {
        refuse("an encoder");
    }
    if (hparams.use_alibi || hparams.f_max_alibi_bias > 0.0f) {
        refuse("ALiBi");
    }
    if (hparams.attn_soft_cap) {
        refuse("attention soft capping");
    }
    if (hparams.is_mla()) {
        refuse("latent attention (MLA)");
    }
    return *kv;
}

static kv_shape read_shape(const llama_context & ctx, const llama_kv_cache & kv) {
    const auto & hparams = ctx.get_model().hparams;

    kv_shape shape;
    for (const uint32_t il : kv.get_layer_ids()) {
        shape.layer_ids.push_back((int32_t) il);
    }
    shape.n_layer  = (int32_t) shape.layer_ids.size();
    shape.kv_size  = (int32_t) kv.get_size();
    shape.n_stream = (int32_t) kv.get_n_stream();

    for (int32_t i = 0; i < shape.n_layer; ++i) {
        const int32_t il = shape.layer_ids[i];

        const int32_t n_head    = (int32_t) hparams.n_head(il);
        const int32_t n_head_kv = (int32_t) hparams.n_head_kv(il);
        const int32_t d_k       = (int32_t) hparams.n_embd_head_k(il);
        const int32_t d_v       = (int32_t) hparams.n_embd_head_v(il);
        if (i > 0 && (n_head != shape.n_head || n_head_kv != shape.n_head_kv || d_k != shape.n_embd_head_k || d_v != shape.n_embd_head_v)) {
            throw unsupported("[elastic_attach] layers with different numbers of heads are not supported");
        }
        shape.n_head        = n_head;
        shape.n_head_kv     = n_head_kv;
        shape.n_embd_head_k = d_k;
        shape.n_embd_head_v = d_v;

        shape.cell_bytes += (int64_t) ggml_row_size(kv.type_k(), (int64_t) d_k * n_head_kv) +
                            (int64_t) ggml_row_size(kv.type_v(), (int64_t) d_v * n_head_kv);
    }
    return shape;
}

// Without flash attention most models scale the logits by this. Where one does not, the graph corrects it.
static float bias_scale_of(const llama_context & ctx, const kv_shape & shape) {
    const float given = ctx.get_model().hparams.f_attention_scale;
    if (ctx.get_cparams().flash_attn) {
        return 1.0f;  // the bias goes into the mask
    }
    return given != 0.0f ? given : 1.0f / std::sqrt((float) shape.n_embd_head_k);
}

// CUDA's does not, and what a device does not support goes through the CPU
static bool fused_op_masks_heads(const ggml_tensor * k, ggml_type type_v, const kv_shape & shape) {
    ggml_init_params params = { 8 * ggml_tensor_overhead(), nullptr, true };
    ggml_context_ptr ctx(ggml_init(params));

    const int64_t n_kv = 256;
    auto *        q    = ggml_new_tensor_4d(ctx.get(), GGML_TYPE_F32, shape.n_embd_head_k, 1, shape.n_head, 1);
    auto *        keys = ggml_new_tensor_4d(ctx.get(), k->type, shape.n_embd_head_k, n_kv, shape.n_head_kv, 1);
    auto *        vals = ggml_new_tensor_4d(ctx.get(), type_v, shape.n_embd_head_v, n_kv, shape.n_head_kv, 1);
    auto *        mask = ggml_new_tensor_4d(ctx.get(), GGML_TYPE_F16, n_kv, 1, shape.n_head, 1);
    auto *        op   = ggml_flash_attn_ext(ctx.get(), q, keys, vals, mask, 1.0f, 0.0f, 0.0f);

    ggml_backend_dev_t dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(k->buffer));
    return !dev || ggml_backend_dev_supports_op(dev, op);
}

// for tests: attention as on a device, which has no op of our own
static bool attention_in_graph() {
    const char * value = std::getenv("ELASTIC_ATTENTION");
    return value && std::string(value) == "graph";
}

elastic_cache::elastic_cache(llama_context & ctx, const config & cfg)
    : cfg(cfg), ctx(ctx), kv(plain_kv_cache(ctx)), shape(read_shape(ctx, kv)) {
    for (const auto & [name, type, trans] :
         { std::make_tuple("K", kv.type_k(), false), std::make_tuple("V", kv.type_v(), kv.get_v_trans()) }) {
        if (!rows_supported(type, trans)) {
            throw unsupported("[elastic_attach] " + std::string(name) + " cache type " + ggml_type_name(type) + " is not supported");
        }
    }
    for (const auto & [name, type, size] :
         { std::make_tuple("K", kv.type_k(), shape.n_embd_head_k), std::make_tuple("V", kv.type_v(), shape.n_embd_head_v) }) {
        if (size % ggml_blck_size(type) != 0) {
            throw unsupported("[elastic_attach] heads of " + std::to_string(size) + " elements with a " + name + " cache of type " +
                              ggml_type_name(type) + ", whose blocks have " + std::to_string(ggml_blck_size(type)) + ", are not supported");
        }
    }
    check_layers(cfg);
    store = std::make_unique<cell_store>(kv, shape, cfg, bias_scale_of(ctx, shape));
    n_touched.assign(shape.n_stream, 0);
    refilled.assign(shape.n_stream, 0);
    n_touched_v.assign(shape.n_stream, 0);
    on_host     = std::all_of(shape.layer_ids.begin(), shape.layer_ids.end(), [&](int32_t il) {
        return ggml_backend_buffer_is_host(kv.get_k_storage(il)->buffer) && ggml_backend_buffer_is_host(kv.get_v_storage(il)->buffer);
    });
    own_attn    = on_host && !attention_in_graph();
    masks_heads = !ctx.get_cparams().flash_attn || std::all_of(shape.layer_ids.begin(), shape.layer_ids.end(), [&](int32_t il) {
        return fused_op_masks_heads(kv.get_k_storage(il), kv.type_v(), shape);
    });
    moves_v     = active() && kv.get_v_trans() && on_host;
    stride_v    = min_stride();
    kv.set_elastic(this);
}

void elastic_cache::check_layers(const config & other) const {
    if (!other.layer_share.empty() && (int32_t) other.layer_share.size() != shape.n_layer) {
        throw error("[elastic] layer_share: got " + std::to_string(other.layer_share.size()) + " layers, expected " +
                    std::to_string(shape.n_layer));
    }
}

elastic_cache::~elastic_cache() {
    kv.set_elastic(nullptr);
}

bool elastic_cache::active() const {
    const bool keeps_all = cfg.pol.select == select_rule::all || (cfg.keep.n_cells == 0 && cfg.keep.fraction >= 1.0 && cfg.max_cells == 0);
    return cfg.record || !keeps_all;
}

int32_t elastic_cache::target_cells(int64_t n_tokens) const {
    const int32_t n = std::max(cfg.min_cells, cfg.keep.cells_for(n_tokens));
    return cfg.max_cells > 0 ? std::min(n, cfg.max_cells) : n;
}

bool elastic_cache::is_prompt(llama_seq_id seq_id) const {
    const auto it = in_prompt.find(seq_id);
    return it != in_prompt.end() && it->second;
}

bool elastic_cache::is_scored(llama_seq_id seq_id) const {
    return score_step || is_prompt(seq_id) || sequence(seq_id).pending;
}

bool elastic_cache::is_shared(uint32_t strm, int32_t cell) const {
    return kv.get_cells_mut(strm).seq_count(cell) > 1;
}

//
// graph
//

bool elastic_cache::want_sums(const llama_ubatch & ubatch) const {
    if (!sums_prompts()) {
        return false;
    }
    // a graph that stays the same is not built anew; where attention comes from llama.cpp's fused op they are not free
    if (cfg.pol.scores_generation() && (own_attn || !ctx.get_cparams().flash_attn)) {
        return true;
    }
    return any_scored(ubatch);
}

bool elastic_cache::any_scored(const llama_ubatch & ubatch) const {
    return std::any_of(ubatch.seq_id_unq, ubatch.seq_id_unq + ubatch.n_seqs_unq, [&](llama_seq_id id) { return is_scored(id); });
}

// the sum over all queries, the decaying one, and single queries: the last n_window of each stream
uint32_t elastic_cache::n_sum_rows(const llama_ubatch & ubatch) const {
    return 1 + (fades(ubatch) ? 1 : 0) + cfg.n_window();
}

// an image's patches look at each other, so they say nothing of what was asked
bool elastic_cache::fades(const llama_ubatch & ubatch) const {
    return cfg.decay() > 0.0f && ubatch.token;
}

// what a query of a sequence counts for: a generated token stands for those since the last one that was added
int32_t elastic_cache::query_count(llama_seq_id seq_id) const {
    return is_prompt(seq_id) ? 1 : std::max(1, sequence(seq_id).n_unscored);
}

void elastic_cache::set_sum_weights(float * dst, const llama_ubatch & ubatch, int64_t n_head, int64_t n_stream) const {
    const int64_t n_tps  = ubatch.n_tokens / n_stream;
    const int64_t n_rows = n_sum_rows(ubatch);
    const float   decay  = cfg.decay();
    const bool    fading = fades(ubatch);

    for (int64_t s = 0; s < n_stream; ++s) {
        std::vector<float> w(n_tps * n_rows, 0.0f);  // [n_tps][n_rows]

        std::map<llama_seq_id, float> faded;
        int64_t                       n_later = 0;
        for (int64_t i = n_tps - 1; i >= 0; --i) {
            const llama_seq_id seq_id = ubatch.seq_id[s * n_tps + i][0];
            if (!is_scored(seq_id)) {
                continue;
            }
            float *     row   = w.data() + i * n_rows;
            const float count = (float) query_count(seq_id);
            row[0]            = count;
            if (fading) {
                float & f = faded.emplace(seq_id, 1.0f).first->second;
                row[1]    = f * count;
                f *= decay;
            }
            if (n_later < cfg.n_window()) {
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
// decode
//

void elastic_cache::on_batch(const llama_batch & batch) {
    take_logits();
    in_prompt.clear();
    score_step = false;
    if (!active()) {
        return;
    }
    // what was removed since the last batch; not every few rows anew
    for (int32_t s = 0; s < shape.n_stream; ++s) {
        if (spare_v || n_touched[s] - n_used(s) >= N_RELEASE) {
            shrink_v();
            release_rows(s, n_used(s));
        }
    }
    spare_v = false;
    release_refilled();

    struct seen {
        int32_t   n       = 0;
        llama_pos pos_min = 0;
        bool      logits  = false;
    };
    std::map<llama_seq_id, seen> in_batch;
    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        for (int32_t j = 0; j < batch.n_seq_id[i]; ++j) {
            auto & s  = in_batch[batch.seq_id[i][j]];
            s.pos_min = s.n == 0 ? batch.pos[i] : std::min(s.pos_min, batch.pos[i]);
            s.logits |= batch.logits && batch.logits[i];
            s.n++;
        }
    }

    for (const auto & [seq_id, s] : in_batch) {
        auto & st = seqs[seq_id];
        if (n_cells(seq_id) == 0) {
            st = {};
            checkpoints.erase(seq_id);
        }

        // the first token after a prompt is alone in its batch, wants logits and has a new position
        const bool generating = !hold && s.n == 1 && s.logits && st.n_tokens > 0 && s.pos_min > st.pos_prompt;
        in_prompt[seq_id]     = !generating;
        if (generating) {
            make_room(seq_id, batch.n_tokens);
            st.n_unscored++;
            score_step |= cfg.pol.scores_generation() && st.n_unscored >= cfg.pol.generation_interval();
        } else {
            if (is_waiting(seq_id)) {
                compress_pending(seq_id);
            }
            if (!st.pending && st.n_tokens > 0) {  // another prompt begins
                take_checkpoint(seq_id);
                note_change(seq_id, s.pos_min, false);
                st.pos_turn = s.pos_min;
            }
            make_room_for_prompt(seq_id, s.n);
        }
        if (!trying) {
            prompt_ends.erase(seq_id);
        }
    }
    note_outputs(batch);
}

void elastic_cache::on_placed(const llama_ubatch & ubatch, const llama_memory_context_i * mctx) {
    if (!active()) {
        return;
    }
    const auto & sinfo = static_cast<const llama_kv_cache_context *>(mctx)->get_slot_info();

    grow_v(!trying && std::any_of(in_prompt.begin(), in_prompt.end(), [](const auto & p) { return p.second; }));

    for (size_t s = 0; s < sinfo.n_stream(); ++s) {
        for (size_t ii = 0; ii < sinfo.size(); ++ii) {
            const size_t       i      = s * sinfo.size() + ii;
            const llama_seq_id seq_id = ubatch.seq_id[i][0];

            const cell_kind kind = !ubatch.token ? cell_kind::image : is_prompt(seq_id) ? cell_kind::text : cell_kind::generated;
            store->reset_cell(sinfo.strm[s], (int32_t) sinfo.idxs[s][ii], kind);

            note_touched(sinfo.strm[s], (int32_t) sinfo.idxs[s][ii] + 1);

            for (int32_t j = 0; j < ubatch.n_seq_id[i]; ++j) {
                auto & st = seqs[ubatch.seq_id[i][j]];
                st.n_tokens++;
                if (is_prompt(ubatch.seq_id[i][j])) {
                    st.pos_prompt     = std::max(st.pos_prompt, ubatch.pos[i]);
                    st.pending        = true;
                    st.n_prompt_cells = n_cells(ubatch.seq_id[i][j]);
                }
            }
        }
    }
}

void elastic_cache::on_computed(const llama_ubatch & ubatch, const llama_memory_context_i * mctx, const llm_graph_result * res) {
    n_to_compute -= (int32_t) ubatch.n_tokens;
    if (res->t_attn_sums.empty() || !any_scored(ubatch)) {
        return;
    }
    ctx.synchronize();
    const int64_t t_start = ggml_time_us();

    const auto &  sinfo    = static_cast<const llama_kv_cache_context *>(mctx)->get_slot_info();
    const int64_t n_stream = (int64_t) sinfo.s1 - sinfo.s0 + 1;
    const int64_t n_tps    = ubatch.n_tokens / n_stream;

    // what earlier queries left fades first; single queries get their places
    std::vector<int32_t> n_queries(n_stream, 0);
    for (int64_t s = 0; s < n_stream; ++s) {
        fade_recent(ubatch, (uint32_t) (sinfo.s0 + s), s * n_tps, n_tps);
        for (int64_t i = 0; i < n_tps && n_queries[s] < cfg.n_window(); ++i) {
            if (is_scored(ubatch.seq_id[s * n_tps + i][0])) {
                store->begin_query((uint32_t) (sinfo.s0 + s));
                n_queries[s]++;
            }
        }
    }

    std::vector<std::vector<float>> used(n_stream);  // up to the last one that is
    for (int64_t s = 0; s < n_stream; ++s) {
        const uint32_t strm = (uint32_t) (sinfo.s0 + s);
        for (int32_t i = 0; i < n_used(strm); ++i) {
            used[s].push_back(kv.get_cells_mut(strm).is_empty(i) ? 0.0f : 1.0f);
        }
    }

    const bool fading = fades(ubatch);

    std::vector<float> data;
    for (const auto & [il_model, t] : res->t_attn_sums) {
        const int32_t il = shape.index_of(il_model);
        if (il < 0) {
            continue;
        }

        const float * sums = (const float *) t->data;
        if (!ggml_backend_buffer_is_host(t->buffer)) {
            data.resize(ggml_nelements(t));
            ggml_backend_tensor_get(t, data.data(), 0, ggml_nbytes(t));
            sums = data.data();
        }

        const int64_t n_kv   = t->ne[0];
        const int64_t n_rows = t->ne[1];
        const int64_t n_head = t->ne[2];
        const int64_t n_gqa  = n_head / shape.n_head_kv;

        for (int64_t s = 0; s < n_stream; ++s) {
            const uint32_t strm = (uint32_t) (sinfo.s0 + s);
            for (int64_t h = 0; h < n_head; ++h) {
                const float * src = sums + (s * n_head + h) * n_rows * n_kv;
                const auto    add = [&](int64_t row, float * dst) {
                    add_share(dst, src + row * n_kv, used[s].data(), (int32_t) used[s].size(), (int32_t) n_gqa);
                };
                const int32_t ih = (int32_t) (h / n_gqa);
                add(0, store->mass_row(strm, il, ih));
                if (fading) {
                    add(1, store->fading_row(strm, il, ih));
                }
                for (int32_t ago = 0; ago < n_queries[s]; ++ago) {
                    add(n_rows - 1 - ago, store->query_row(strm, ago, il, ih));
                }
            }
        }
    }
    for (uint32_t s = 0; s < ubatch.n_seqs_unq; ++s) {
        if (is_scored(ubatch.seq_id_unq[s])) {
            seqs[ubatch.seq_id_unq[s]].n_unscored = 0;
        }
    }
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        for (int32_t j = 0; j < ubatch.n_seq_id[i]; ++j) {
            if (is_scored(ubatch.seq_id[i][j])) {
                note_change(ubatch.seq_id[i][j], ubatch.pos[i], false);
            }
        }
    }
    stats.t_score_us += ggml_time_us() - t_start;
}

// the decaying score of each cell, by as many steps as its sequence has queries among [first, first + n)
void elastic_cache::fade_recent(const llama_ubatch & ubatch, uint32_t strm, int64_t first, int64_t n) {
    const float decay = cfg.decay();
    if (!fades(ubatch)) {
        return;
    }
    std::map<llama_seq_id, int32_t> n_later;
    for (int64_t i = first; i < first + n; ++i) {
        const llama_seq_id seq_id = ubatch.seq_id[i][0];
        if (is_scored(seq_id)) {
            n_later[seq_id] += query_count(seq_id);
        }
    }
    const int32_t      n_rows = n_used(strm);
    std::vector<float> factor(n_rows, 1.0f);
    for (const auto & [seq_id, count] : n_later) {
        const float faded = std::pow(decay, (float) count);
        for (const auto & [pos, cell] : kv.get_cells(seq_id).seq_pos_get(seq_id)) {
            factor[cell] *= faded;
        }
    }
    for (int32_t il = 0; il < shape.n_layer; ++il) {
        for (int32_t ih = 0; ih < shape.n_head_kv; ++ih) {
            float * row = store->fading_row(strm, il, ih);
            for (int32_t i = 0; i < n_rows; ++i) {
                row[i] *= factor[i];
            }
        }
    }
}

//
// memory
//

bool elastic_cache::on_seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    if (!active()) {
        return true;
    }

    struct removal {
        llama_seq_id id;
        int64_t      n;
        bool         all;
        bool         to_checkpoint;
    };
    std::vector<removal> removals;

    // first look, then act: a refusal leaves every sequence as it was
    for (const auto & [id, st] : seqs) {
        if (seq_id >= 0 && id != seq_id) {
            continue;
        }
        const auto & all = kv.get_cells(id).seq_pos_get(id);
        const auto   lo  = all.lower_bound({ p0, 0 });
        const auto   hi  = all.lower_bound({ p1, 0 });
        const auto   n   = (int64_t) std::distance(lo, hi);
        if (n == 0) {
            continue;
        }
        const bool whole    = n == (int64_t) all.size() && p0 <= kv.seq_pos_max(id) + 1 - st.n_tokens;
        const bool to_end   = hi == all.end();
        const bool in_past  = p0 <= (to_end ? st.pos_changed : st.pos_moved);
        const bool restores = !whole && in_past && !taking_back && to_end && find_checkpoint(id, p0);
        if (!whole && in_past && !taking_back && !restores) {
            LLAMA_LOG_DEBUG("%s: sequence %d cannot be cut at [%d, %d), but from %d on\n", __func__, id, p0, p1, can_cut(id, p0));
            return false;
        }
        removals.push_back({ id, n, whole, restores });
    }

    for (const auto & r : removals) {
        auto &     st = seqs[r.id];
        const auto it = prompt_ends.find(r.id);
        if (it != prompt_ends.end() && (r.all || it->second.pos_end > p0)) {
            prompt_ends.erase(it);
        }
        if (r.all) {
            st = {};
            checkpoints.erase(r.id);
            continue;
        }
        if (r.to_checkpoint) {
            restore(r.id, p0);
            continue;
        }
        auto & kept = checkpoints[r.id];  // those of the time before
        kept.erase(std::remove_if(kept.begin(), kept.end(), [&](const checkpoint & ck) { return ck.pos_end > p0; }), kept.end());

        st.n_tokens -= r.n;
        st.n_unscored = std::max(0, st.n_unscored - (int32_t) r.n);
        if (p1 > st.pos_prompt && p0 <= st.pos_prompt) {
            st.pos_prompt = p0 - 1;
            st.pending    = true;  // what is left of the prompt was not compressed, and may be when its answer begins
        }
        st.n_prompt_cells = std::min<int32_t>(st.n_prompt_cells, n_cells(r.id) - (int32_t) r.n);
    }
    return true;
}

void elastic_cache::on_seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    GGML_UNUSED(p0);
    GGML_UNUSED(p1);
    if (!active() || seq_id_src == seq_id_dst) {
        return;
    }
    seqs[seq_id_dst] = seqs[seq_id_src];
    checkpoints.erase(seq_id_dst);
    prompt_ends.erase(seq_id_dst);

    const auto s0 = kv.get_stream(seq_id_src);
    const auto s1 = kv.get_stream(seq_id_dst);
    if (s0 != s1) {
        store->copy_stream(s0, s1, n_used(s0));
        n_touched[s1] = n_touched_v[s1] = shape.kv_size;  // llama.cpp copies all of a stream
        refilled[s1]                    = 1;
    }
}

void elastic_cache::on_seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    const auto it = seqs.find(seq_id);
    if (it == seqs.end()) {
        return;
    }
    refilled[kv.get_stream(seq_id)] = 1;  // rotates all rows
    checkpoints.erase(seq_id);
    prompt_ends.erase(seq_id);
    for (llama_pos * pos : { &it->second.pos_prompt, &it->second.pos_moved, &it->second.pos_changed }) {
        if (*pos >= p0 && *pos < p1) {
            *pos += shift;
        }
    }
}

void elastic_cache::on_clear() {
    seqs.clear();
    checkpoints.clear();
    prompt_ends.clear();
    outputs.clear();
    store->reset();
    stride_v = min_stride();
    for (int32_t s = 0; s < shape.n_stream; ++s) {
        release_rows(s, 0);
    }
}

//
// callers' side
//

int32_t elastic_cache::n_used(uint32_t strm) const {
    return (int32_t) kv.get_cells_mut(strm).used_max_p1();
}

int32_t elastic_cache::n_threads() const {
    return cfg.n_threads > 0 ? cfg.n_threads : (int32_t) ctx.n_threads_batch();
}

int32_t elastic_cache::n_cells(llama_seq_id seq_id) const {
    return (int32_t) kv.get_cells(seq_id).seq_pos_get(seq_id).size();
}

void elastic_cache::check_seq_id(llama_seq_id seq_id) const {
    const int32_t n = (int32_t) kv.get_n_seq_max();
    if (seq_id < 0 || seq_id >= n) {
        throw error("[elastic] seq_id: got " + std::to_string(seq_id) + ", expected 0 <= seq_id < " + std::to_string(n));
    }
}

sequence_state elastic_cache::sequence(llama_seq_id seq_id) const {
    const auto it = seqs.find(seq_id);
    return it == seqs.end() ? sequence_state{} : it->second;
}

bool elastic_cache::empty() const {
    for (int32_t s = 0; s < shape.n_stream; ++s) {
        if (kv.get_cells_mut(s).get_used() > 0) {
            return false;
        }
    }
    return true;
}

std::vector<int32_t> elastic_cache::logical_cells(llama_seq_id seq_id) const {
    std::vector<int32_t> res;
    for (const auto & [pos, cell] : kv.get_cells(seq_id).seq_pos_get(seq_id)) {
        res.push_back((int32_t) cell);
    }
    return res;
}

std::vector<int32_t> elastic_cache::held_rows(uint32_t strm, const std::vector<int32_t> & rows) const {
    std::vector<int32_t> res(shape.n_layer, (int32_t) rows.size());
    for (int32_t il = 0; store->any_absent() && il < shape.n_layer; ++il) {
        for (const int32_t row : rows) {
            res[il] -= store->is_absent(strm, row, il);
        }
    }
    return res;
}

std::vector<int32_t> elastic_cache::held_rows(llama_seq_id seq_id) const {
    return held_rows(kv.get_stream(seq_id), logical_cells(seq_id));
}

int32_t elastic_cache::average(const std::vector<int32_t> & held) {
    const int64_t total = std::accumulate(held.begin(), held.end(), (int64_t) 0);
    return (int32_t) ((total + (int64_t) held.size() - 1) / (int64_t) held.size());
}

int32_t elastic_cache::n_held(llama_seq_id seq_id) const {
    return average(held_rows(seq_id));
}

int64_t elastic_cache::kv_bytes(llama_seq_id seq_id) const {
    const auto held    = held_rows(seq_id);
    int64_t    n_total = (int64_t) n_cells(seq_id) * shape.n_layer;
    if (frees_rows()) {
        n_total = std::accumulate(held.begin(), held.end(), (int64_t) 0);
    }
    return n_total * shape.cell_bytes / shape.n_layer + n_cells(seq_id) * store->bias_bytes_per_cell();
}

std::vector<int32_t> elastic_cache::own_cells(llama_seq_id seq_id) const {
    std::vector<int32_t> res;
    for (const int32_t cell : logical_cells(seq_id)) {
        if (!is_shared(kv.get_stream(seq_id), cell)) {
            res.push_back(cell);
        }
    }
    return res;
}

std::pair<head_map, head_map> elastic_cache::gather_recent(llama_seq_id seq_id) const {
    const auto rows = logical_cells(seq_id);
    const auto strm = kv.get_stream(seq_id);
    return { store->gather_fading(strm, rows), store->gather_window(strm, rows) };
}

cell_state elastic_cache::gather(llama_seq_id seq_id) const {
    return store->gather(kv.get_stream(seq_id), logical_cells(seq_id));
}

}  // namespace elastic
