#pragma once

#include "core/scorer.h"

namespace elastic {

// Queries of a window. The same for every policy that has one, so that a recorded prompt serves all of them.
constexpr int32_t window_size = 32;

// Attention of the last queries, averaged over the cells around each (SnapKV).
class window_scorer : public scorer {
  public:
    const char * name() const override { return "window"; }
    // the runtime keeps a window beside the sums
    statistics   needs() const override { return { true, window_size, 0.0f, false }; }
    bool         is_attention() const override { return true; }
    head_map     score(const score_view & v) const override;

    int32_t n_near = 7;  // as SnapKV
};

}  // namespace elastic
