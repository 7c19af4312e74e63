#pragma once

// A policy is four small choices; policies() is the one table of them. Score, select and combine act
// once after a prompt (score.h, select.h, combine.h), generate at every step (generate.h).

#include "core/plan.h"
#include "core/types.h"

namespace elastic {

enum class score_rule : int32_t {
    none,             // nothing is scored (full)
    random,           // a fixed shuffle per layer and KV head (the floor)
    recency,          // logical index (local: sinks + most recent)
    frequency,        // column sum of the prompt's attention, per KV head
    frequency_layer,  // the same, averaged over the heads of a layer (the paper)
    frequency_model,  // the same, averaged over all layers and heads
    window,           // attention of the last queries, pooled over neighbors, per KV head (SnapKV)
    by_kind,          // frequency and the last queries together, pooled over text or over image cells; see score.h
};

enum class select_rule : int32_t {
    all,           // every cell stays
    top,           // highest score over all cells
    heavy_recent,  // the most recent cells take half of the places, the highest scores the other half (H2O)
    window_top,    // the last window_size cells stay, the highest scores take the rest (SnapKV)
    image_first,   // text stays, image cells share what is left; see select.h
    cover,         // the same share for each kind, cells taken so that those left out have a near one; see cover.h
};

enum class combine_rule : int32_t {
    evict,         // dropped cells are lost
    nearest_mean,  // join the nearest anchor by logical index, K and V become the mean (the paper)
    mass,          // dropped cells join the nearest kept one: V by score, log bias, an image's K moves part of the way
};

enum class generate_rule : int32_t {
    keep,      // nothing leaves
    distance,  // the cell at logical index P - offset leaves (the paper's fixed point)
    lowest,    // lowest stored score among the prompt's cells, then the oldest generated token
    heavy,     // lowest score among all but the most recent half, scores updated at every step (H2O)
    per_head,  // in each head the lowest score, all attention and recent one, updated now and then, of all but the last tokens
    merge,     // nothing leaves: the cache grows by an overdraft, and then is compressed as after a prompt
};

// queries of the recent score of score_rule::window, and the cells that select_rule::window_top keeps
constexpr int32_t window_size        = 32;
// how much the weight of a query of text shrinks with every later one in the recent score of score_rule::by_kind
constexpr float   text_decay         = 0.9f;
// and how much of what a cell of text was looked at goes on to the next
constexpr float   text_follow        = 0.94f;
// tokens of an answer that are tried first, so that the recent score says what an answer looks at
constexpr int32_t text_lookahead     = 16;
// generate_rule::per_head: the newest tokens that never leave
constexpr int32_t per_head_recent    = 16;
// and the tokens up to which an answer counts as short: text that was kept whole stays as long
constexpr int32_t short_answer       = 4;
// and the tokens between two of which the attention is added to the scores, of all heads and cells: that costs time
constexpr int32_t score_interval     = 4;
// generate_rule::merge: cells beyond the budget that an answer may take before it is compressed
constexpr int32_t merge_overdraft    = 32;
// combine_rule::mass: how far the key of an image's anchor moves to the mean of its group's
constexpr float   key_weight         = 0.4f;
// and the power of the attention expected of a cell of an image that it counts for in its group. Chosen on 20 conversations of the dev
// split (embedded model, budget 0.2): captions after five questions 156 of 180 objects right, 144 with a power of 1, questions the same
constexpr float   image_weight_power = 0.5f;
// and the cells that it leaves for the answer, which then has to drop fewer while it is written
constexpr int32_t answer_reserve     = 4;
// select_rule::cover: the newest text stays as it is, a quarter of all cells at most
constexpr int32_t text_recent        = 16;
// and so do the first cells of every image
constexpr int32_t image_start        = 3;
// neighbors that a recent score is averaged over, and in score_rule::by_kind: what belongs to a word is said around it
constexpr int32_t pool_size          = 7;
constexpr int32_t kind_pool_size     = 13;
// score_rule::by_kind: what the recent score counts for image cells while the question is still to come
constexpr float   asked_ahead        = 3.0f;

struct policy {
    const char *  name;
    score_rule    score;
    select_rule   select;
    combine_rule  combine;
    generate_rule generate;
    const char *  summary;

    bool needs_importance() const { return score >= score_rule::frequency || combine == combine_rule::mass || scores_generation(); }
    bool needs_bias() const { return combine == combine_rule::mass; }

    // the recent score: a sum over the last n_window queries, or one in which a query's weight
    // shrinks by this factor with every one after it, text only
    int32_t n_window() const { return score == score_rule::window ? window_size : 0; }
    float   decay() const { return score == score_rule::by_kind ? text_decay : 0.0f; }
    bool    needs_recent() const { return n_window() > 0 || decay() > 0.0f; }
    // tokens that are tried before a prompt of text is compressed
    int32_t lookahead() const { return score == score_rule::by_kind ? text_lookahead : 0; }

    // whether kept cells are ordered by score, so that the last of them may leave in all heads at once
    bool    ranked() const { return generate == generate_rule::lowest; }
    bool    needs_rows() const { return select == select_rule::cover; }
    // whether scores go on while generating
    bool    scores_generation() const { return generate >= generate_rule::heavy; }
    // at every how many tokens
    int32_t generation_interval() const { return generate == generate_rule::heavy ? 1 : score_interval; }
    // cells that an answer may take beyond the budget
    int32_t overdraft() const { return generate == generate_rule::merge ? merge_overdraft : 0; }
    // whether each head lets a cell of its own leave while generating
    bool    leaves_per_head() const { return scores_generation() && score != score_rule::frequency_model; }
};

const std::vector<policy> & policies();
const policy &              find_policy(const std::string & name);  // throws elastic::error listing the names

struct plan_params {
    int32_t n_keep = 0;  // cells to keep, 1 <= n_keep <= n_cells
    int32_t n_sink = 1;  // first cells that always stay (clamped to n_keep - 1)

    // select_rule::cover: cells of each layer in relation to the others', n_keep on average; empty: the same for all  [n_layer]
    std::vector<float> layer_share;

    int32_t n_rank_max = 0;  // and the most that a layer keeps, at least n_keep; 0: no limit
};

// what a score may look at; `recent` may be empty (n_cells == 0) for rules that do not look at it
struct importance_map {
    head_map sum;     // attention received from all queries  [n_layer][n_head_kv][n_cells]
    head_map recent;  // from the last ones, see policy::n_window and policy::decay
};

// keys and values as f32, for select_rule::cover only
struct row_source {
    virtual ~row_source()                                             = default;
    virtual int32_t n_embd_head_k() const                             = 0;
    virtual int32_t n_embd_head_v() const                             = 0;
    // fill dst [n_cells][n_embd_head]
    virtual void    load_k(int32_t il, int32_t ih, float * dst) const = 0;
    virtual void    load_v(int32_t il, int32_t ih, float * dst) const = 0;
};

// of n_keep cells those that a compressed prompt leaves free: answer_reserve, or an eighth if that is less; 0 if it ends with an image
int32_t cells_for_answer(const policy & pol, const cells & c, int32_t n_keep);

// pure: the plan for one compression. The shape of importance.sum is always set; its values may be all zero for
// rules that need none. n_threads: layers are shared between them.
// throws elastic::error on NaN scores, sizes that do not agree, n_keep out of range
plan make_plan(const policy & pol, const plan_params & params, const cells & c, const importance_map & importance, const row_source * rows,
               int32_t n_threads = 1);

}  // namespace elastic
