#pragma once

#include "runtime/elastic_cache.h"

namespace elastic {

// the elastic cache attached to a context, nullptr if none
elastic_cache * attached(const llama_context * ctx);

// the C++ side of elastic_attach and elastic_detach: the same, with exceptions
elastic_cache & attach(llama_context & ctx, const elastic_params & params);
void            detach(llama_context & ctx);

}  // namespace elastic
