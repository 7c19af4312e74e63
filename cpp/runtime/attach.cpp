// The C interface (elastic.h): no exception leaves it.

#include "runtime/attach.h"
#include "runtime/pages.h"

#include "llama-context.h"

#include <functional>

namespace elastic {

static thread_local std::string last_error;

struct not_empty : std::runtime_error {
    using std::runtime_error::runtime_error;
};

elastic_cache * attached(const llama_context * ctx) {
    return ctx ? dynamic_cast<elastic_cache *>(const_cast<llama_context *>(ctx)->get_elastic()) : nullptr;
}

elastic_cache & attach(llama_context & ctx, const elastic_params & params) {
    const config cfg = make_config(params);

    if (auto * old = attached(&ctx)) {
        old->check_layers(cfg);
        if (!old->empty()) {
            throw not_empty("[elastic_attach] the cache holds cells; clear it first (llama_memory_clear)");
        }
        ctx.set_elastic(nullptr);
    }
    auto cache = std::make_unique<elastic_cache>(ctx, cfg);
    if (!cache->empty()) {
        throw not_empty("[elastic_attach] the cache holds cells; clear it first (llama_memory_clear)");
    }
    auto & res = *cache;
    ctx.set_elastic(std::move(cache));
    return res;
}

void detach(llama_context & ctx) {
    auto * cache = attached(&ctx);
    if (cache && cache->has_bias()) {
        throw not_empty("[elastic_detach] some cells carry an attention bias; clear the cache first (llama_memory_clear)");
    }
    if (cache) {
        cache->restore_layout();
        ctx.set_elastic(nullptr);
    }
}

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
        /*.delay     =*/0,
        /*.lookahead =*/-1,
        /*.overdraft =*/-1,
        /*.n_checkpoints  =*/2,
        /*.layer_share    =*/nullptr,
        /*.n_layer_share  =*/0,
        /*.record    =*/false,
        /*.release_memory =*/true,
    };
}

void elastic_lazy_buffers(bool value) {
    set_lazy_buffers(value);
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

void elastic_hold(llama_context * ctx, bool hold) {
    if (auto * cache = attached(ctx)) {
        cache->set_hold(hold);
    }
}

int32_t elastic_compress(llama_context * ctx, llama_seq_id seq_id) {
    return guarded([&] {
        need(ctx).check_seq_id(seq_id);
        return need(ctx).compress(seq_id);
    });
}

int32_t elastic_look_ahead(llama_context * ctx, const llama_seq_id * seq_ids, const llama_token * tokens, int32_t n) {
    return guarded([&] {
        if (n < 0 || (n > 0 && (!seq_ids || !tokens))) {
            throw error("[elastic_look_ahead] seq_ids and tokens must not be NULL, and n not negative");
        }
        return need(ctx).look_ahead({ seq_ids, seq_ids + n }, { tokens, tokens + n });
    });
}

int32_t elastic_n_cells(const llama_context * ctx, llama_seq_id seq_id) {
    return guarded([&] {
        need(ctx).check_seq_id(seq_id);
        return need(ctx).n_cells(seq_id);
    });
}

int32_t elastic_n_held(const llama_context * ctx, llama_seq_id seq_id) {
    return guarded([&] {
        need(ctx).check_seq_id(seq_id);
        return need(ctx).n_held(seq_id);
    });
}

int64_t elastic_n_tokens(const llama_context * ctx, llama_seq_id seq_id) {
    const auto * cache = attached(ctx);
    return cache ? cache->sequence(seq_id).n_tokens : 0;
}

llama_pos elastic_can_cut(const llama_context * ctx, llama_seq_id seq_id, llama_pos p0) {
    const auto * cache = attached(ctx);
    return cache ? cache->can_cut(seq_id, p0) : p0;
}

int32_t elastic_restore_logits(llama_context * ctx, llama_seq_id seq_id) {
    return guarded([&] {
        need(ctx).check_seq_id(seq_id);
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
    elastic_stats res       = cache->stats;
    res.n_bytes_checkpoints = cache->checkpoint_bytes();
    return res;
}

void elastic_reset_stats(llama_context * ctx) {
    if (auto * cache = attached(ctx)) {
        cache->stats = {};
    }
}

const char * elastic_last_error(void) {
    return last_error.c_str();
}
