#pragma once

// A policy is five parts that fit together. Score, layer budget, selector and combiner act once after a prompt; the
// evictor acts at every step. Each policy is one file in core/policies/, and one line in registry.cpp.

#include "core/combiner.h"
#include "core/evictor.h"
#include "core/layer_budget.h"
#include "core/layout.h"
#include "core/scorer.h"

#include <memory>
#include <string>

namespace elastic {

// an immutable part, shared between the copies of a policy
template <typename T> class part {
  public:
    part() = default;
    template <typename U> part(std::shared_ptr<U> p) : p(std::move(p)) {}

    const T * operator->() const { return p.get(); }
    operator const T &() const { return *p; }
    explicit operator bool() const { return (bool) p; }

  private:
    std::shared_ptr<const T> p;
};

template <typename T, typename... Args> std::shared_ptr<const T> make_part(Args &&... args) {
    return std::make_shared<const T>(std::forward<Args>(args)...);
}

struct policy {
    std::string name;
    std::string summary;  // one line for --help

    part<scorer>       score;
    part<layer_budget> layers;
    part<selector>     select;
    part<combiner>     combine;
    part<evictor>      generate;

    // what its parts need together
    statistics needs() const;

    // after a prompt
    bool    keeps_all() const { return select->keeps_all(); }
    bool    needs_importance() const { return needs().sum; }
    bool    needs_rows() const { return needs().rows; }
    int32_t n_window() const { return needs().n_window; }
    float   decay() const { return needs().decay; }
    bool    needs_recent() const { return needs().recent(); }
    // whether rows carry a bias on their logits; one of -infinity masks a cell of single layers
    bool    needs_bias() const { return combine->weighs_scores() || varies_layers(); }
    // whether the tokens that a cell stands for are counted
    bool    needs_counts() const { return combine->how() == merging::mean; }
    bool    merges() const { return combine->merges(); }
    // whether layers may keep different numbers of cells
    bool    varies_layers() const { return layers->varies(); }
    // whether its layer budget says by itself which layers keep more
    bool    shares_layers() const { return layers->varies() && !layers->takes_shares(); }
    // whether it takes shares of layers from outside (plan_params::layer_share)
    bool    can_vary_layers() const { return layers->takes_shares(); }

    // while generating
    bool    evicts() const { return generate->evicts(); }
    // whether kept cells are ordered by score, so that the last of them may be evicted in all heads at once
    bool    ranked() const { return generate->by_rank(); }
    // whether scores go on while generating
    bool    scores_generation() const { return generate->per_head(); }
    // at every how many tokens
    int32_t generation_interval() const { return generate->interval(); }
    // cells that an answer may take beyond the budget before it is compressed too; 0: it never is
    int32_t overdraft() const { return generate->overdraft(); }
    bool    recompresses() const { return generate->overdraft() > 0; }
    // whether each head evicts a cell of its own while generating
    bool    evicts_per_head() const { return generate->per_head(); }
};

// Checks that the parts fit together. Throws elastic::error with what does not.
policy compose(std::string name, std::string summary, part<scorer> score, part<layer_budget> layers, part<selector> select,
               part<combiner> combine, part<evictor> generate);

// the policy with other scores
policy with_scorer(policy pol, part<scorer> score);

// registry.cpp: the one table
const std::vector<policy> & policies();
const policy &              find_policy(const std::string & name);  // throws elastic::error listing the names
// what all policies need together, each in its own form
statistics                  recorded_statistics();

// cells that a compressed prompt leaves free for its answer, of n_keep
int32_t cells_for_answer(const policy & pol, const cells & c, int32_t n_keep);

// pure: the plan for one compression. The shape of importance.sum is always set; its values may be all zero where the policy needs
// none. n_threads: layers are shared between them.
// throws elastic::error on NaN scores, sizes that do not agree, n_keep out of range
plan make_plan(const policy & pol, const plan_params & params, const cells & c, const importance_map & importance, const row_source * rows,
               int32_t n_threads = 1);

}  // namespace elastic
