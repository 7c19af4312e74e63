#pragma once

// Memory that is given back to the operating system page by page. Only pages of ordinary host memory can be, and
// only where the system says that they read as zero afterwards (Linux); elsewhere zeros are written.

#include "ggml-backend.h"

#include <cstddef>

namespace elastic {

size_t page_size();

// zeroes the bytes; whole pages among them are given back and taken again when they are next written.
// returns the bytes given back
size_t release_bytes(void * data, size_t size);

// whether release_bytes() gives pages of this buffer back
bool can_release(ggml_backend_buffer_t buffer);

// like ggml_backend_buffer_clear(buffer, 0), without touching pages where that can be avoided
void clear_lazily(ggml_backend_buffer_t buffer);

// gives back what the allocator keeps of freed memory, where it can (glibc)
void trim_heap();

}  // namespace elastic
