#pragma once

#include "core/policy.h"

namespace elastic {

// fills bucket of the plan from its kept cells
//   nearest_mean: nearest kept cell by logical index, ties to the earlier; never a pinned anchor
//   mass: a dropped image cell -> the kept, not pinned image cell whose key has the highest cosine (ties: the earlier);
//         dropped text, or no kept image cell: evicted
void assign_buckets(combine_rule rule, const cells & c, const key_source * keys, plan & p, int32_t n_threads);

}  // namespace elastic
