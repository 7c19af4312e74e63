// How llama.cpp zeroes the K and V buffers of new caches (patch 0001).

#include "runtime/elastic.h"
#include "runtime/pages.h"

#include "llama-elastic.h"

thread_local void (*llama_elastic_new_buffer)(ggml_backend_buffer_t buffer, uint8_t value) = ggml_backend_buffer_clear;

void elastic_lazy_buffers(bool value) {
    const auto lazily = [](ggml_backend_buffer_t buffer, uint8_t) {
        elastic::clear_lazily(buffer);
    };
    llama_elastic_new_buffer = value ? lazily : ggml_backend_buffer_clear;
}
