// Preloaded into a program that knows nothing of us: each context that it makes gets an elastic cache.
// ELASTIC_BUDGET: as in elastic_params. ELASTIC_COMPRESS_SAVED: a sequence is compressed before its state is saved, for programs that
// want no logits of its prompt. How often prompts were compressed is said when a context is freed.

#include "runtime/elastic.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>

extern "C" llama_context * llama_init_from_model(llama_model * model, llama_context_params params) {
    static const auto real = (decltype(&llama_init_from_model)) dlsym(RTLD_NEXT, "llama_init_from_model");

    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;  // which an elastic cache needs
    llama_context * ctx    = real(model, params);

    elastic_params elastic = elastic_default_params();
    elastic.min_cells      = 8;
    elastic.layers         = ELASTIC_LAYERS_EVEN;  // to measure them would make another context
    if (const char * budget = std::getenv("ELASTIC_BUDGET")) {
        elastic.budget = std::atof(budget);
    }
    if (ctx && elastic_attach(ctx, &elastic) != 0) {
        std::fprintf(stderr, "%s\n", elastic_last_error());
        std::exit(70);
    }
    return ctx;
}

extern "C" size_t llama_state_seq_get_size(llama_context * ctx, llama_seq_id seq_id) {
    static const auto real = (decltype(&llama_state_seq_get_size)) dlsym(RTLD_NEXT, "llama_state_seq_get_size");

    if (std::getenv("ELASTIC_COMPRESS_SAVED") && elastic_compress(ctx, seq_id) < 0) {
        std::fprintf(stderr, "%s\n", elastic_last_error());
        std::exit(70);
    }
    return real(ctx, seq_id);
}

extern "C" void llama_free(llama_context * ctx) {
    static const auto real = (decltype(&llama_free)) dlsym(RTLD_NEXT, "llama_free");

    std::fprintf(stderr, "elastic: %lld compressions\n", (long long) elastic_get_stats(ctx).n_compressions);
    real(ctx);
}
