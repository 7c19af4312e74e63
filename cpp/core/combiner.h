#pragma once

// What becomes of the cells that are not kept?

#include "core/plan.h"
#include "core/statistics.h"

#include <algorithm>

namespace elastic {

// how the cells of a bucket become one, carried out by merge.h
enum class merging : int32_t {
    none,    // they do not: the dropped ones are lost
    mean,    // mean of K and V by the number of tokens
    biased,  // mean by the plan's weights, and a bias on the logits so that the cell receives what all of them would have
};

// one layer and head of a plan
struct head_plan {
    const cells &   c;
    const int32_t * kept;  // [n_keep], -1: the rank is masked in the layer
    int32_t         n_keep;
    const int32_t * nearest;  // neighbours (select.h), set where wants_neighbours()  [n_cells]
};

class combiner {
  public:
    virtual ~combiner() = default;

    virtual const char * name() const = 0;
    virtual statistics   needs() const { return {}; }
    virtual merging      how() const { return merging::none; }
    virtual bool         wants_neighbours() const { return false; }

    bool merges() const { return how() != merging::none; }
    // whether it weighs cells by their scores, which then have to be expected attention
    bool weighs_scores() const { return how() == merging::biased; }

    // bucket [n_cells]: ranks of the kept cells are set, all others -1
    virtual void join(const head_plan & /*h*/, int32_t * /*bucket*/) const {}
    // fills weight and key_weight of the plan where it merges by them
    virtual void weigh(const cells & /*c*/, head_map /*score*/, plan & /*p*/) const {}
};

// dropped cells are lost
class evict_combiner : public combiner {
  public:
    const char * name() const override { return "evict"; }
};

}  // namespace elastic
