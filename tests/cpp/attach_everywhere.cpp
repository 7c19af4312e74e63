// Preloaded into a program that knows nothing of us: each context that it makes gets an elastic cache.
// ELASTIC_BUDGET: as in elastic_params.

#include "runtime/elastic.h"

#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>

extern "C" llama_context * llama_init_from_model(llama_model * model, llama_context_params params) {
    using fn        = llama_context * (*) (llama_model *, llama_context_params);
    const auto real = (fn) dlsym(RTLD_NEXT, "llama_init_from_model");

    llama_context * ctx = real(model, params);

    elastic_params elastic = elastic_default_params();
    elastic.min_cells      = 8;
    if (const char * budget = std::getenv("ELASTIC_BUDGET")) {
        elastic.budget = std::atof(budget);
    }
    if (ctx && elastic_attach(ctx, &elastic) != 0) {
        std::fprintf(stderr, "%s\n", elastic_last_error());
        std::exit(70);
    }
    return ctx;
}
