#include "core/assign.h"
#include "core/policy.h"

#include <cmath>
#include <limits>

namespace elastic {

namespace {

[[noreturn]] void refuse(const std::string & what) {
    throw error("[make_plan] " + what);
}

void check_cells(const cells & c, int32_t n_layer) {
    const int32_t n = c.size();
    if (!c.masked.empty() && (int64_t) c.masked.size() != (int64_t) n_layer * n) {
        refuse("masked: got " + std::to_string(c.masked.size()) + " entries, expected n_layer * n_cells");
    }
    if ((!c.old.empty() && (int32_t) c.old.size() != n) || (!c.tokens.empty() && (int32_t) c.tokens.size() != n)) {
        refuse("old, tokens: got " + std::to_string(c.old.size()) + " and " + std::to_string(c.tokens.size()) +
               " entries, expected one for each cell or none");
    }
    for (const int32_t x : c.tokens) {
        if (x < 1) {
            refuse("tokens: got " + std::to_string(x) + ", expected at least 1 for each cell");
        }
    }
}

void check_params(const plan_params & params, const policy & pol, int32_t n_cells, int32_t n_layer) {
    if (params.n_keep < 1 || params.n_keep > n_cells) {
        refuse("n_keep: got " + std::to_string(params.n_keep) + ", expected 1 <= n_keep <= " + std::to_string(n_cells));
    }
    if (!params.layer_share.empty() && (int32_t) params.layer_share.size() != n_layer) {
        refuse("layer_share: got " + std::to_string(params.layer_share.size()) + " layers, expected " + std::to_string(n_layer));
    }
    for (const float x : params.layer_share) {
        if (!(x > 0.0f) || std::isinf(x)) {
            refuse("layer_share: got " + std::to_string(x) + ", expected finite values > 0");
        }
    }
    if (!params.layer_share.empty() && pol.keeps_all()) {
        refuse("layer_share: got it with the policy " + pol.name + ", which keeps every cell");
    }
    if (params.n_sink < 0) {
        refuse("n_sink: got " + std::to_string(params.n_sink) + ", expected >= 0");
    }
}

void check_importance(const head_map & m) {
    for (const float x : m.data) {
        if (!(x >= 0.0f) || std::isinf(x)) {
            refuse("importance: got " + std::to_string(x) + ", expected finite values >= 0");
        }
    }
}

bool has_shape(const head_map & m, int32_t n_layer, int32_t n_head_kv, int32_t n) {
    return m.n_layer == n_layer && m.n_head_kv == n_head_kv && m.n_cells == n && m.data.size() == (size_t) n_layer * n_head_kv * n;
}

void check(const policy & pol, const plan_params & params, const cells & c, const importance_map & importance, const row_source * rows) {
    const int32_t n   = c.size();
    const auto &  sum = importance.sum;
    if (n < 1) {
        refuse("cells: got none, expected at least 1");
    }
    if ((int32_t) c.pinned.size() != n) {
        refuse("pinned: got " + std::to_string(c.pinned.size()) + " entries, expected " + std::to_string(n));
    }
    if (sum.n_layer < 1 || sum.n_head_kv < 1 || !has_shape(sum, sum.n_layer, sum.n_head_kv, n)) {
        refuse("importance: its shape does not agree with " + std::to_string(n) + " cells");
    }
    const auto needs = pol.needs();
    if (needs.recent() && !has_shape(importance.recent, sum.n_layer, sum.n_head_kv, n)) {
        refuse("recent: its shape does not agree with the importance, and the policy " + pol.name + " looks at it");
    }
    check_params(params, pol, n, sum.n_layer);
    check_cells(c, sum.n_layer);
    if (needs.rows && !rows) {
        refuse("rows: got none, but the policy " + pol.name + " looks at keys and values");
    }
    if (needs.sum) {
        check_importance(sum);
    }
    if (needs.recent()) {
        check_importance(importance.recent);
    }
}

void check_scores(const policy & pol, const head_map & score, const head_map & like) {
    const std::string by = std::string("scores of \"") + pol.score->name() + "\": ";
    if (!has_shape(score, like.n_layer, like.n_head_kv, like.n_cells)) {
        refuse(by + "got [" + std::to_string(score.n_layer) + ", " + std::to_string(score.n_head_kv) + ", " +
               std::to_string(score.n_cells) + "], expected [n_layer, n_head_kv, n_cells] = [" + std::to_string(like.n_layer) + ", " +
               std::to_string(like.n_head_kv) + ", " + std::to_string(like.n_cells) + "]");
    }
    const bool  weighed = pol.combine->weighs_scores() || pol.select->weighs_scores();
    const float least   = weighed ? 0.0f : std::numeric_limits<float>::lowest();
    for (const float x : score.data) {
        if (!(x >= least) || std::isinf(x)) {
            refuse(by + "got " + std::to_string(x) + ", expected finite values" + (weighed ? " >= 0" : ""));
        }
    }
}

}  // namespace

plan make_plan(const policy & pol, const plan_params & params, const cells & c, const importance_map & importance, const row_source * rows,
               int32_t n_threads) {
    check(pol, params, c, importance, rows);

    plan p;
    p.n_layer   = importance.sum.n_layer;
    p.n_head_kv = importance.sum.n_head_kv;
    p.n_cells   = c.size();

    head_map score = pol.score->score({ c, importance, rows, n_threads });
    check_scores(pol, score, importance.sum);

    plan_params own = params;
    own.n_keep      = pol.keeps_all() ? p.n_cells : params.n_keep;

    const auto   share = params.layer_share.empty() ? pol.layers->shares(p.n_layer) : params.layer_share;
    const layout l     = lay_out(pol.select, pol.ranked(), own, share, c);
    p.n_keep           = l.n_ranks;

    auto nearest = select_cells(pol.select, l, score, rows, p, n_threads);
    sum_rank_scores(l, score, p);
    assign_buckets(pol.combine, c, l, std::move(nearest), rows, p, n_threads);
    pol.combine->weigh(c, std::move(score), p);
    return p;
}

}  // namespace elastic
