#include "runtime/pages.h"

#include <cstdint>
#include <cstring>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace elastic {

#ifdef __linux__

size_t page_size() {
    static const size_t res = (size_t) sysconf(_SC_PAGESIZE);
    return res;
}

// private anonymous pages read as zero after this, see madvise(2)
static bool give_back(void * data, size_t size) {
    return madvise(data, size, MADV_DONTNEED) == 0;
}

bool can_release(ggml_backend_buffer_t buffer) {
    return ggml_backend_buffer_get_type(buffer) == ggml_backend_cpu_buffer_type();
}

#else

size_t page_size() {
    return 4096;
}

static bool give_back(void *, size_t) {
    return false;
}

bool can_release(ggml_backend_buffer_t) {
    return false;
}

#endif

size_t release_bytes(void * data, size_t size) {
    const uintptr_t page  = page_size();
    const uintptr_t begin = (uintptr_t) data;
    const uintptr_t end   = begin + size;
    const uintptr_t lo    = (begin + page - 1) / page * page;
    const uintptr_t hi    = end / page * page;

    if (lo >= hi || !give_back((void *) lo, hi - lo)) {
        std::memset(data, 0, size);
        return 0;
    }
    std::memset(data, 0, lo - begin);
    std::memset((void *) hi, 0, end - hi);
    return hi - lo;
}

void trim_heap() {
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}

void clear_lazily(ggml_backend_buffer_t buffer) {
    if (can_release(buffer)) {
        release_bytes(ggml_backend_buffer_get_base(buffer), ggml_backend_buffer_get_size(buffer));
    } else {
        ggml_backend_buffer_clear(buffer, 0);
    }
}

}  // namespace elastic
