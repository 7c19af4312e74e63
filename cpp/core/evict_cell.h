#pragma once

// Evictors that take the same cell from all layers and heads.

#include "core/evictor.h"

namespace elastic {

// The paper's fixed point: index n_prompt - offset, clamped to [n_sink, n_cells - 2]. Where that cell may not be evicted, the next later
// one that may, then the next earlier.
class distance_evictor : public evictor {
  public:
    const char * name() const override { return "distance"; }
};

// Lowest finite score of a rank, then the oldest generated cell, then as distance_evictor; ties to the earlier.
class lowest_evictor : public evictor {
  public:
    const char * name() const override { return "lowest"; }
    bool         by_rank() const override { return true; }
    int32_t      cell(const cells & c, int32_t n_prompt, int32_t offset, int32_t n_sink, const std::vector<float> & total) const override;
};

}  // namespace elastic
