#pragma once

// Where the kept cells of a sequence go, before any score is looked at: runs, cells of each layer, ranks.

#include "core/plan_params.h"
#include "core/selector.h"

namespace elastic {

// Ranks of a run: as many as the layer that keeps most of it. The protected cells that it ends with have the last ranks in every
// layer, since they are the newest in each; in a layer that keeps fewer those before them are masked.
struct run_ranks {
    int32_t              first  = 0;  // rank of its first kept cell
    int32_t              n_body = 0;  // ranks before those of the tail
    std::vector<int32_t> tail;        // cells that some layer holds and that have a rank of their own, ascending

    int32_t n_keep() const { return n_body + (int32_t) tail.size(); }
    // -1: not of the tail
    int32_t tail_rank(int32_t cell) const;
};

struct layout {
    protection                    protect;
    std::vector<run>              runs;       // in logical order, which is the order of their ranks
    std::vector<std::vector<run>> of_layers;  // as each layer has them: cells that it holds, and how many it keeps  [runs][n_layer]
    std::vector<run_ranks>        ranks;      // [runs]
    bool                          ranked  = false;
    int32_t                       n_ranks = 0;

    // whether the same cells of the run stay in every head of a layer, each at a rank of its own
    bool is_fixed(size_t r) const { return runs[r].whole() && !ranked; }
};

// Protected cells at the beginning; clamped so that the newest cells stay too.
int32_t sink_cells(const selector & s, const plan_params & params);

// The first n_sink cells, the newest, pinned ones, and as many of the verbatim ones as there is room for, the later first.
// Throws elastic::error where those that must stay exceed n_keep.
protection protect_cells(const selector & s, const plan_params & params, const cells & c);

// share: cells of each layer in relation to the others'  [n_layer]
//   ranked: a run's ranks go by score, highest first, between the protected cells that it begins with and its
//   other protected cells: then the last of them is the least important one in every layer and head at once, and
//   may be evicted without moving anything. Otherwise ranks are in logical order.
layout lay_out(const selector & s, bool ranked, const plan_params & params, const std::vector<float> & share, const cells & c);

}  // namespace elastic
