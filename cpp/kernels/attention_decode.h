#pragma once

// Attention of few queries, as while generating: K and V are read once and as they are stored, cells that are hidden not at all.

#include "kernels/attention_prefill.h"

namespace elastic {

// the cells that each query may see, in ascending order  [n_q]
typedef std::vector<std::vector<int32_t>> seen_cells;

// the heads [first, last)
void attend_few(const attention & a, const seen_cells & seen, int32_t first, int32_t last);

}  // namespace elastic
