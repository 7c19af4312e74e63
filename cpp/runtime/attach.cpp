#include "runtime/attach.h"

#include "llama-context.h"

namespace elastic {

elastic_cache * attached(const llama_context * ctx) {
    return ctx ? dynamic_cast<elastic_cache *>(const_cast<llama_context *>(ctx)->get_elastic()) : nullptr;
}

elastic_cache & attach(llama_context & ctx, const elastic_params & params) {
    const config cfg = make_config(params);

    if (auto * old = attached(&ctx)) {
        check_layers(cfg, old->parts().kv.shape.n_layer);
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
        ctx.set_elastic(nullptr);
    }
}

}  // namespace elastic
