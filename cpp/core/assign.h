#pragma once

#include "core/combiner.h"
#include "core/select.h"

namespace elastic {

// The kept cell of its run nearest in K and V to each cell that is not kept (distances of kernels/distances.h); none that is verbatim.
// Equal distances: the earlier one.
neighbours find_neighbours(const layout & l, const plan & p, const row_source & rows, int32_t n_threads);

// Fills bucket of the plan from its kept cells. `nearest` is empty where the selection looked for none: it is found here if wanted.
void assign_buckets(const combiner & m, const cells & c, const layout & l, neighbours nearest, const row_source * rows, plan & p,
                    int32_t n_threads);

}  // namespace elastic
