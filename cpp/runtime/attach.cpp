#include "runtime/attach.h"

#include "runtime/measure_layers.h"
#include "runtime/watched_memory.h"

#include "llama-context.h"

#include <map>
#include <mutex>

namespace elastic {

elastic_cache * attached(const llama_context * ctx) {
    const auto * memory = ctx ? watched_memory::of(*ctx) : nullptr;
    return memory ? memory->cache() : nullptr;
}

// nullptr: the one that is there goes
static void set_cache(llama_context & ctx, std::unique_ptr<elastic_cache> cache) {
    ctx.set_elastic(cache.get());
    watched_memory::of(ctx)->set_cache(std::move(cache));
}

// measured once for each model
static std::vector<float> measured_shares(llama_context & ctx) {
    static std::mutex                                                      mutex;
    static std::map<std::pair<const void *, uint64_t>, std::vector<float>> found;

    auto *     model = const_cast<llama_model *>(&ctx.get_model());
    const auto key   = std::make_pair((const void *) model, llama_model_size(model));

    std::lock_guard<std::mutex> lock(mutex);
    const auto                  it = found.find(key);
    if (it == found.end()) {
        try {
            return found[key] = layer_shares(measure_layers(model, (int32_t) ctx.n_threads_batch()));
        } catch (const std::exception & e) {
            log_error(std::string("all layers keep as many cells: ") + e.what());
            return found[key];
        }
    }
    return it->second;
}

static config resolve(llama_context & ctx, const elastic_params & params, const part<scorer> & external) {
    config cfg = make_config(params);
    if (external) {
        cfg.pol = with_scorer(cfg.pol, external);
    }
    if (params.layers == ELASTIC_LAYERS_AUTO && cfg.may_vary_layers() && resident_memory::can_free_layers(kv_view(ctx))) {
        cfg.layer_share = params.n_layer_share > 0 ? std::vector<float>(params.layer_share, params.layer_share + params.n_layer_share)
                                                   : measured_shares(ctx);
    }
    return cfg;
}

elastic_cache & attach(llama_context & ctx, const elastic_params & params, const part<scorer> & external) {
    const config cfg = resolve(ctx, params, external);

    if (auto * old = attached(&ctx)) {
        check_layers(cfg, old->parts().kv.shape.n_layer);
        if (!old->empty()) {
            throw not_empty("[elastic_attach] the cache holds cells; clear it first (llama_memory_clear)");
        }
        set_cache(ctx, nullptr);
    }
    auto cache = std::make_unique<elastic_cache>(ctx, cfg);
    if (!cache->empty()) {
        throw not_empty("[elastic_attach] the cache holds cells; clear it first (llama_memory_clear)");
    }
    auto & res = *cache;
    set_cache(ctx, std::move(cache));
    return res;
}

void detach(llama_context & ctx) {
    auto * cache = attached(&ctx);
    if (cache && cache->has_bias()) {
        throw not_empty("[elastic_detach] some cells carry an attention bias; clear the cache first (llama_memory_clear)");
    }
    if (cache) {
        set_cache(ctx, nullptr);
    }
}

}  // namespace elastic
