#pragma once

#include "core/policy.h"

namespace elastic {

// fills bucket of the plan from its kept cells
//   nearest_mean: nearest kept cell by logical index, ties to the earlier; never a pinned anchor
//   mass:         what cover.h found
void assign_buckets(combine_rule rule, const cells & c, plan & p);

}  // namespace elastic
