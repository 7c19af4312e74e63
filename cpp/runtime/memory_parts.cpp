#include "runtime/memory_parts.h"

#include "llama-context.h"
#include "llama-kv-cache-dsa-iswa.h"
#include "llama-kv-cache-dsa.h"
#include "llama-kv-cache-dsv4.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache-msa.h"
#include "llama-kv-cache.h"
#include "llama-memory-hybrid-idx.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-memory-recurrent.h"
#include "llama-model.h"

#include <algorithm>
#include <string>

namespace elastic {

namespace {

[[noreturn]] void refuse(const std::string & why) {
    throw unsupported("[elastic_attach] " + why + "; run this model with the elastic cache off");
}

template <typename T> bool is(const llama_memory_i * mem) {
    return dynamic_cast<const T *>(mem) != nullptr;
}

// what is wrong with the model, whatever its memory is
void check_model(const llama_model & model) {
    const auto & hparams = model.hparams;
    if (llama_model_has_encoder(&model)) {
        refuse("the model has an encoder, whose output is no part of the KV cache");
    }
    if (!hparams.causal_attn || model.arch == LLM_ARCH_LLAMA_EMBED) {
        refuse("the model's attention is not causal (an embedding model), so it reads each text as a whole and uses no KV cache");
    }
    if (model.arch == LLM_ARCH_GROK) {
        refuse("llama.cpp runs the model without flash attention only, and then V is stored transposed");
    }
    if (hparams.use_alibi || hparams.f_max_alibi_bias > 0.0f) {
        refuse("the model tells distances by ALiBi, a bias by position, which a cell that stands for several tokens does not have");
    }
    if (hparams.is_mla()) {
        refuse("the model's attention is latent (MLA): its cache holds one vector per token that all heads share, not K and V");
    }
}

void check_memory(const llama_memory_i * mem) {
    if (!mem) {
        refuse("the model has no KV cache: it reads each text as a whole (an embedding or a diffusion model)");
    }
    if (is<llama_memory_recurrent>(mem)) {
        refuse("the model is recurrent: its memory is a state of fixed size, and there is no KV cache");
    }
    if (is<llama_memory_hybrid_idx>(mem) || is<llama_kv_cache_dsa>(mem) || is<llama_kv_cache_dsa_iswa>(mem) ||
        is<llama_kv_cache_dsv4>(mem) || is<llama_kv_cache_msa>(mem)) {
        refuse("the model's attention is sparse: it chooses cells by an index of keys, which merged cells would not agree with");
    }
}

void take_window(memory_parts & parts, llama_kv_cache_iswa & kv) {
    parts.attention = kv.get_base();
    parts.window    = kv.get_swa();
}

}  // namespace

memory_parts::memory_parts(llama_context & ctx) : hparams(ctx.get_model().hparams) {
    auto * mem = llama_elastic_watched(ctx.get_memory());
    check_memory(mem);
    check_model(ctx.get_model());

    if (auto * kv = dynamic_cast<llama_kv_cache *>(mem)) {
        attention = kv;
    } else if (auto * kv = dynamic_cast<llama_kv_cache_iswa *>(mem)) {
        take_window(*this, *kv);
    } else if (auto * hybrid = dynamic_cast<llama_memory_hybrid *>(mem)) {
        attention = hybrid->get_mem_attn();
        recurrent = hybrid->get_mem_recr();
    } else if (auto * hybrid = dynamic_cast<llama_memory_hybrid_iswa *>(mem)) {
        take_window(*this, *hybrid->get_mem_attn());
        recurrent = hybrid->get_mem_recr();
    } else {
        refuse("the model's memory is of a kind that is not known here");
    }
    if (attention->get_layer_ids().empty()) {
        refuse("no layer of the model attends to everything before it, so there is no cache that grows with the text");
    }
}

const llama_kv_cache_context & memory_parts::attention_of(const llama_memory_context_i & mctx) {
    if (auto * c = dynamic_cast<const llama_kv_cache_iswa_context *>(&mctx)) {
        return *c->get_base();
    }
    if (auto * c = dynamic_cast<const llama_memory_hybrid_context *>(&mctx)) {
        return *c->get_attn();
    }
    if (auto * c = dynamic_cast<const llama_memory_hybrid_iswa_context *>(&mctx)) {
        return *c->get_attn()->get_base();
    }
    return static_cast<const llama_kv_cache_context &>(mctx);
}

bool memory_parts::in_window(llama_pos pos_from, llama_pos pos_to) const {
    return !llama_hparams::is_masked_swa(hparams.n_swa, hparams.swa_type, pos_from, pos_to);
}

static bool can_cut_window(const llama_kv_cache & kv, const llama_hparams & hparams, llama_seq_id seq_id, llama_pos p0) {
    const auto &    all  = kv.get_cells(seq_id).seq_pos_get(seq_id);
    const llama_pos held = all.empty() ? -1 : all.begin()->first;
    // the position before the oldest cell is one that is held, or no token at p0 looks at it
    return held <= 0 || p0 <= 0 || llama_hparams::is_masked_swa(hparams.n_swa, hparams.swa_type, held - 1, p0);
}

static bool can_cut_recurrent(const llama_memory_recurrent & mem, llama_seq_id seq_id, llama_pos p0) {
    const llama_pos last = mem.seq_pos_max(seq_id);
    if (p0 <= 0 || p0 > last) {
        return true;
    }
    const bool rolled_back = (size_t) seq_id < mem.rs_idx.size() && mem.rs_idx[seq_id] != 0;
    return !rolled_back && last - (p0 - 1) <= (llama_pos) mem.n_rs_seq;
}

bool memory_parts::can_cut(llama_seq_id seq_id, llama_pos p0) const {
    return (!window || can_cut_window(*window, hparams, seq_id, p0)) && (!recurrent || can_cut_recurrent(*recurrent, seq_id, p0));
}

int32_t memory_parts::n_free(llama_seq_id seq_id) const {
    const auto usable = [&](const llama_kv_cache & kv) {
        const auto & cells = kv.get_cells(seq_id);
        int32_t      res   = (int32_t) (cells.size() - cells.get_used());
        for (uint32_t i = 0; &kv == window && i < cells.size(); ++i) {  // llama.cpp uses again what its sequence does not look at any more
            if (!cells.is_empty(i) && cells.seq_count(i) == 1) {
                const llama_pos next = cells.seq_pos_max(cells.seq_get(i)) + 1;
                res += llama_hparams::is_masked_swa(hparams.n_swa, hparams.swa_type, cells.pos_get(i), next);
            }
        }
        return res;
    };
    return window ? std::min(usable(*attention), usable(*window)) : usable(*attention);
}

int32_t memory_parts::n_window_lacks(int32_t n_ubatch) const {
    if (!window) {
        return 0;
    }
    const int32_t n_seqs = window->get_n_stream() == 1 ? (int32_t) window->get_n_seq_max() : 1;
    return std::max(0, (int32_t) hparams.n_swa * n_seqs + n_ubatch - (int32_t) window->get_size());
}

static int64_t allocated(const llama_memory_i * mem) {
    int64_t res = 0;
    for (const auto & [_, n] : mem ? mem->memory_breakdown() : std::map<ggml_backend_buffer_type_t, size_t>()) {
        res += (int64_t) n;
    }
    return res;
}

int64_t memory_parts::other_bytes() const {
    return allocated(window) + allocated(recurrent);
}

static int64_t used_by(const llama_kv_cache & kv, llama_seq_id seq_id) {
    const auto & cells = kv.get_cells(seq_id);
    int64_t      n     = 0;
    for (uint32_t i = 0; i < cells.size(); ++i) {
        n += !cells.is_empty(i) && cells.seq_has(i, seq_id);
    }
    return n * (allocated(&kv) / ((int64_t) kv.get_size() * kv.get_n_stream()));
}

static int64_t used_by(const llama_memory_recurrent & mem, llama_seq_id seq_id) {
    const auto n = std::count_if(mem.cells.begin(), mem.cells.end(), [&](const auto & cell) { return cell.has_seq_id(seq_id); });
    return (int64_t) n * (allocated(&mem) / std::max<int64_t>(1, mem.size));
}

bytes_in_use memory_parts::in_use(llama_seq_id seq_id) const {
    bytes_in_use res;
    res.attention = used_by(*attention, seq_id);
    res.other     = (window ? used_by(*window, seq_id) : 0) + (recurrent ? used_by(*recurrent, seq_id) : 0);
    return res;
}

int32_t memory_parts::n_seq_max() const {
    return (int32_t) attention->get_n_seq_max();
}

int32_t memory_parts::other_cells() const {
    return window ? (int32_t) (window->get_size() * window->get_n_stream()) : recurrent ? (int32_t) recurrent->size : 0;
}

const char * memory_parts::kind() const {
    if (recurrent) {
        return window ? "hybrid, sliding window" : "hybrid";
    }
    return window ? "sliding window" : "plain";
}

}  // namespace elastic
