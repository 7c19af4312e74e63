// How llama.cpp zeroes K and V buffers (patch 0001).

#include "runtime/lazy_buffers.h"

#include "runtime/elastic.h"
#include "runtime/pages.h"

thread_local void (*llama_elastic_clear_buffer)(ggml_backend_buffer_t buffer, uint8_t value) = ggml_backend_buffer_clear;

static void lazily(ggml_backend_buffer_t buffer, uint8_t) {
    elastic::clear_lazily(buffer);
}

void elastic_lazy_buffers(bool value) {
    llama_elastic_clear_buffer = value ? lazily : ggml_backend_buffer_clear;
}

namespace elastic {

lazy_buffers::lazy_buffers(bool wanted) : before(llama_elastic_clear_buffer) {
    llama_elastic_clear_buffer = wanted ? lazily : ggml_backend_buffer_clear;
}

}  // namespace elastic
