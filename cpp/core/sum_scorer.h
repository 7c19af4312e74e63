#pragma once

#include "core/scorer.h"

namespace elastic {

// Attention received from all queries: column sums of the prompt's attention, per KV head.
class sum_scorer : public scorer {
  public:
    const char * name() const override { return "frequency"; }
    statistics   needs() const override { return { true, 0, 0.0f, false }; }
    bool         is_attention() const override { return true; }
    head_map     score(const score_view & v) const override { return v.importance.sum; }
};

}  // namespace elastic
