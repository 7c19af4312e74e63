#pragma once

// A policy is four small choices; policies() is the one table of them. Score, select and combine act
// once after a prompt (score.h, select.h, combine.h), generate at every step (generate.h).

#include "core/plan.h"
#include "core/types.h"

namespace elastic {

enum class score_rule : int32_t {
    none,             // nothing is scored (full)
    frequency,        // column sum of the prompt's attention, per KV head
    frequency_layer,  // the same, averaged over the heads of a layer (the paper)
    recency,          // logical index (local: sinks + most recent)
};

enum class select_rule : int32_t {
    all,          // every cell stays
    top,          // highest score over all cells
    image_first,  // text stays, image cells share what is left; see select.h
};

enum class combine_rule : int32_t {
    evict,         // dropped cells are lost
    nearest_mean,  // join the nearest anchor by logical index, K and V become the mean (the paper)
    mass,          // image cells join the most similar kept image key, V weighted by importance, K kept, log bias
};

enum class generate_rule : int32_t {
    keep,      // nothing leaves
    distance,  // the cell at logical index P - offset leaves (the paper's fixed point)
    score,     // image cell of lowest stored importance, then the oldest generated token
};

struct policy {
    const char *  name;
    score_rule    score;
    select_rule   select;
    combine_rule  combine;
    generate_rule generate;
    const char *  summary;

    bool needs_importance() const {
        return score == score_rule::frequency || score == score_rule::frequency_layer || combine == combine_rule::mass;
    }
    bool needs_bias() const { return combine == combine_rule::mass; }
};

const std::vector<policy> & policies();
const policy &              find_policy(const std::string & name);  // throws elastic::error listing the names

struct plan_params {
    int32_t n_keep = 0;  // cells to keep, 1 <= n_keep <= n_cells
    int32_t n_sink = 1;  // first cells that always stay (clamped to n_keep - 1)
};

// keys of one layer as f32, needed by combine_rule::mass only: fills dst [n_cells][n_embd_head]
struct key_source {
    virtual ~key_source()                                           = default;
    virtual int32_t n_embd_head() const                             = 0;
    virtual void    load(int32_t il, int32_t ih, float * dst) const = 0;
};

// pure: the plan for one compression. importance: [n_layer][n_head_kv][n_cells] (shape always set,
// values may be all zero for rules that need none). n_threads: layers are shared between them.
// throws elastic::error on NaN scores, sizes that do not agree, n_keep out of range
plan make_plan(const policy & pol, const plan_params & params, const cells & c, const head_map & importance, const key_source * keys,
               int32_t n_threads = 1);

}  // namespace elastic
