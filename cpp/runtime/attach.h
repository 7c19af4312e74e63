#pragma once

#include "runtime/elastic_cache.h"

namespace elastic {

// the cache holds cells, or some that detaching would change
struct not_empty : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// the elastic cache attached to a context, nullptr if none
elastic_cache * attached(const llama_context * ctx);

// the C++ side of elastic_attach and elastic_detach: the same, with exceptions
// external: scores instead of those of the policy that params names, or empty
elastic_cache & attach(llama_context & ctx, const elastic_params & params, const part<scorer> & external = {});
void            detach(llama_context & ctx);

}  // namespace elastic
