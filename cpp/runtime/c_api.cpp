// The C interface (elastic.h): no exception leaves it.

#include "runtime/attach.h"
#include "runtime/inspect.h"
#include "runtime/measure_layers.h"

#include <algorithm>
#include <functional>

namespace elastic {

static thread_local std::string last_error;

static int32_t guarded(const std::function<int32_t()> & fn) {
    last_error.clear();
    try {
        return fn();
    } catch (const error & e) {
        last_error = e.what();
        return -1;
    } catch (const unsupported & e) {
        last_error = e.what();
        return -2;
    } catch (const not_empty & e) {
        last_error = e.what();
        return -3;
    } catch (const std::exception & e) {
        last_error = e.what();
        return -4;
    }
}

static elastic_cache & need(const llama_context * ctx) {
    auto * cache = attached(ctx);
    if (!cache) {
        throw error("[elastic] no elastic cache is attached to this context; call elastic_attach first");
    }
    return *cache;
}

static elastic_cache & need(const llama_context * ctx, llama_seq_id seq_id) {
    auto & cache = need(ctx);
    cache.parts().check_seq_id(seq_id);
    return cache;
}

}  // namespace elastic

using namespace elastic;

elastic_params elastic_default_params(void) {
    return {
        /*.policy    =*/"elastic",
        /*.budget    =*/0.2,
        /*.n_sink    =*/1,
        /*.offset    =*/25,
        /*.min_cells =*/64,
        /*.n_threads =*/0,
        /*.max_cells =*/0,
        /*.overdraft =*/-1,
        /*.n_checkpoints  =*/2,
        /*.layers         =*/ELASTIC_LAYERS_AUTO,
        /*.layer_share    =*/nullptr,
        /*.n_layer_share  =*/0,
        /*.record    =*/false,
        /*.release_memory =*/true,
        /*.n_question     =*/0,
    };
}

int32_t elastic_attach(llama_context * ctx, const elastic_params * params) {
    return guarded([&] {
        if (!ctx || !params) {
            throw error("[elastic_attach] ctx and params must not be NULL");
        }
        attach(*ctx, *params);
        return 0;
    });
}

int32_t elastic_measure_layers(llama_model * model, int32_t n_threads, float * scores, int32_t n) {
    return guarded([&] {
        if (!model || !scores || n_threads < 1) {
            throw error("[elastic_measure_layers] model and scores must not be NULL, and n_threads at least 1");
        }
        const auto found = measure_layers(model, n_threads);
        if (n < (int32_t) found.size()) {
            throw error("[elastic_measure_layers] n: got " + std::to_string(n) + ", expected at least " + std::to_string(found.size()));
        }
        std::copy(found.begin(), found.end(), scores);
        return (int32_t) found.size();
    });
}

int32_t elastic_detach(llama_context * ctx) {
    return guarded([&] {
        if (ctx) {
            detach(*ctx);
        }
        return 0;
    });
}

bool elastic_is_attached(const llama_context * ctx) {
    return attached(ctx) != nullptr;
}

void elastic_set_prefill(llama_context * ctx, bool value) {
    if (auto * cache = attached(ctx)) {
        cache->set_prefill(value);
    }
}

int32_t elastic_compress(llama_context * ctx, llama_seq_id seq_id) {
    return guarded([&] { return need(ctx, seq_id).room().compress(seq_id); });
}

int32_t elastic_compress_prefix(llama_context * ctx, llama_seq_id seq_id, double budget) {
    return guarded([&] { return need(ctx, seq_id).room().compress_prefix(seq_id, elastic::budget::from_value(budget)); });
}

int32_t elastic_equalize_layers(llama_context * ctx, llama_seq_id seq_id) {
    return guarded([&] { return need(ctx, seq_id).room().equalize_layers(seq_id); });
}

int32_t elastic_make_room(llama_context * ctx, llama_seq_id seq_id, int32_t n_new) {
    return guarded([&] { return need(ctx, seq_id).room().make_room(seq_id, n_new); });
}

int32_t elastic_begin_probe(llama_context * ctx) {
    return guarded([&] {
        need(ctx).begin_probe();
        return 0;
    });
}

void elastic_end_probe(llama_context * ctx) {
    if (auto * cache = attached(ctx)) {
        cache->end_probe();
    }
}

int32_t elastic_n_to_drop(const llama_context * ctx, llama_seq_id seq_id) {
    return guarded([&] { return need(ctx, seq_id).room().n_to_drop(seq_id); });
}

static kv_view view_of(const llama_context * ctx) {
    if (!ctx) {
        throw error("[elastic] ctx must not be NULL");
    }
    return kv_view(*const_cast<llama_context *>(ctx));
}

static kv_view view_of(const llama_context * ctx, llama_seq_id seq_id) {
    kv_view       kv = view_of(ctx);
    const int32_t n  = kv.n_seq_max();
    if (seq_id < 0 || seq_id >= n) {
        throw error("[elastic] seq_id: got " + std::to_string(seq_id) + ", expected 0 <= seq_id < " + std::to_string(n));
    }
    return kv;
}

int32_t elastic_get_memory(const llama_context * ctx, elastic_memory * memory) {
    return guarded([&] {
        if (!memory) {
            throw error("[elastic_get_memory] memory must not be NULL");
        }
        *memory = describe_memory(view_of(ctx));
        return 0;
    });
}

int32_t elastic_n_free(const llama_context * ctx, llama_seq_id seq_id) {
    return guarded([&] { return view_of(ctx, seq_id).parts.n_free(seq_id); });
}

llama_pos elastic_next_pos(const llama_context * ctx, llama_seq_id seq_id) {
    return guarded([&] { return view_of(ctx, seq_id).pos_next(seq_id); });
}

bool elastic_can_probe(const llama_context * ctx) {
    const auto * cache = attached(ctx);
    return cache && cache->can_probe();
}

int32_t elastic_n_cells(const llama_context * ctx, llama_seq_id seq_id) {
    return guarded([&] { return need(ctx, seq_id).parts().kv.n_cells(seq_id); });
}

int32_t elastic_n_per_layer(const llama_context * ctx, llama_seq_id seq_id) {
    return guarded([&] { return need(ctx, seq_id).parts().n_per_layer(seq_id); });
}

int64_t elastic_n_tokens(const llama_context * ctx, llama_seq_id seq_id) {
    const auto * cache = attached(ctx);
    return cache ? cache->parts().seqs.get(seq_id).n_tokens : 0;
}

llama_pos elastic_can_cut(const llama_context * ctx, llama_seq_id seq_id, llama_pos p0) {
    const auto * cache = attached(ctx);
    return cache ? cache->can_cut(seq_id, p0) : p0;
}

int32_t elastic_restore_logits(llama_context * ctx, llama_seq_id seq_id) {
    return guarded([&] {
        if (!need(ctx).restore_logits(seq_id)) {
            throw error("[elastic_restore_logits] the last token of the sequence is not the last one of a prompt whose logits are kept");
        }
        return 0;
    });
}

elastic_stats elastic_get_stats(const llama_context * ctx) {
    const auto * cache = attached(ctx);
    if (!cache) {
        return {};
    }
    return cache->stats();
}

void elastic_reset_stats(llama_context * ctx) {
    if (auto * cache = attached(ctx)) {
        cache->reset_stats();
    }
}

const char * elastic_last_error(void) {
    return last_error.c_str();
}
