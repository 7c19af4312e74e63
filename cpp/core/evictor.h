#pragma once

// Which cell is evicted while generating?

#include "core/statistics.h"

namespace elastic {

// The newest tokens that an evictor per head spares, and that a sequence without cells of its own keeps. Chosen on the dev scenes
// and texts with the embedded model. The runtime looks at it under every policy.
constexpr int32_t per_head_recent = 16;

class evictor {
  public:
    virtual ~evictor() = default;

    virtual const char * name() const = 0;
    virtual statistics   needs() const { return {}; }
    // false: nothing is evicted, and the cache grows
    virtual bool         evicts() const { return true; }
    // whether each head evicts a cell of its own, by scores that are kept up while generating
    virtual bool         per_head() const { return false; }
    // at every how many tokens the attention is added to the scores
    virtual int32_t      interval() const { return 1; }
    // whether it goes by the ranks of the plan, which then are ordered by score
    virtual bool         by_rank() const { return false; }
    // cells beyond the budget that an answer may take before all is compressed again; 0: never compressed again
    virtual int32_t      overdraft() const { return 0; }
    // cells of n_keep that a compressed prompt leaves free for its answer
    virtual int32_t      reserve(const cells & /*c*/, int32_t /*n_keep*/) const { return 0; }

    // Logical index of the cell to evict in all heads, -1: none. Unless overridden at the index n_prompt - offset.
    virtual int32_t cell(const cells & c, int32_t n_prompt, int32_t offset, int32_t n_sink, const std::vector<float> & total) const;
    // the eviction candidates of each head, in logical order
    virtual std::vector<int32_t> candidates(const cells & /*c*/, int32_t /*n_sink*/, const std::vector<float> & /*total*/) const {
        return {};
    }
};

// every cell stays
class keep_evictor : public evictor {
  public:
    const char * name() const override { return "keep"; }
    bool         evicts() const override { return false; }
};

}  // namespace elastic
