#pragma once

// While it lives, this thread's K and V buffers are zeroed without being written, where the operating system can do that.

#include "runtime/llama-elastic.h"

namespace elastic {

class lazy_buffers {
  public:
    explicit lazy_buffers(bool wanted);
    ~lazy_buffers() { llama_elastic_clear_buffer = before; }

    lazy_buffers(const lazy_buffers &)             = delete;
    lazy_buffers & operator=(const lazy_buffers &) = delete;

  private:
    decltype(llama_elastic_clear_buffer) before;
};

}  // namespace elastic
