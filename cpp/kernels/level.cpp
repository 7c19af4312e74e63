#include "kernels/level.h"

namespace elastic {

const char * kernel_level() {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    return "x86-64-v4";
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
    return "x86-64-v3";
#else
    return "generic";
#endif
}

}  // namespace elastic
