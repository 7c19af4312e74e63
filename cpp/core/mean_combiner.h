#pragma once

#include "core/combiner.h"

namespace elastic {

// Dropped cells join the nearest kept cell by logical index, ties to the earlier; never a pinned one.
class mean_combiner : public combiner {
  public:
    const char * name() const override { return "merge_mean"; }
    merging      how() const override { return merging::mean; }
    void         join(const head_plan & h, int32_t * bucket) const override;
};

}  // namespace elastic
