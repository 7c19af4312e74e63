#pragma once

namespace elastic {

// what the kernels in use were compiled for, such as "x86-64-v4"; "generic": any processor of this kind
const char * kernel_level();

}  // namespace elastic
