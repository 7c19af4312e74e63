#include "core/policy.h"

#include "core/combine.h"
#include "core/cover.h"
#include "core/score.h"
#include "core/select.h"

#include <algorithm>
#include <cmath>

namespace elastic {

const std::vector<policy> & policies() {
    using s = score_rule;
    using k = select_rule;
    using c = combine_rule;
    using g = generate_rule;

    static const std::vector<policy> table = {
        // clang-format off
        { "full",          s::none,            k::all,          c::evict,        g::keep,     "every cell stays" },
        { "random",        s::random,          k::top,          c::evict,        g::lowest,   "cells drawn at random per KV head (the floor)" },
        { "local",         s::recency,         k::top,          c::evict,        g::distance, "sinks and the most recent cells stay (StreamingLLM)" },
        { "h2o",           s::frequency,       k::heavy_recent, c::evict,        g::heavy,    "half heavy hitters, half recent, per KV head, scores updated at every token (H2O)" },
        { "h2o-shared",    s::frequency_model, k::heavy_recent, c::evict,        g::heavy,    "the same with one set for all layers and heads" },
        { "snapkv",        s::window,          k::window_top,   c::evict,        g::lowest,   "attention of the last queries, pooled, per KV head (SnapKV)" },
        { "elastic-paper", s::frequency_layer, k::top,          c::nearest_mean, g::distance, "anchors per layer, neighbours averaged into them (Elastic Cache, section 3)" },
        { "elastic-evict", s::by_kind,         k::image_first,  c::evict,        g::per_head, "text stays, image cells per KV head, the others are lost" },
        { "elastic",       s::by_kind,         k::cover,        c::mass,         g::merge,    "text stays while it can, then cells per KV head; the others are merged and keep the attention they were to draw" },
        // clang-format on
    };
    return table;
}

const policy & find_policy(const std::string & name) {
    std::string names;
    for (const auto & p : policies()) {
        if (name == p.name) {
            return p;
        }
        names += (names.empty() ? "" : ", ") + std::string(p.name);
    }
    throw error("[policy] got \"" + name + "\", expected one of " + names);
}

static void check(const policy & pol, const plan_params & params, const cells & c, const importance_map & importance,
                  const row_source * rows) {
    const auto refuse = [](const std::string & what) {
        throw error("[make_plan] " + what);
    };

    const int32_t n = c.size();
    if (n < 1) {
        refuse("cells: got none, expected at least 1");
    }
    if ((int32_t) c.pinned.size() != n) {
        refuse("pinned: got " + std::to_string(c.pinned.size()) + " entries, expected " + std::to_string(n));
    }
    const auto & sum    = importance.sum;
    const auto & recent = importance.recent;
    if (sum.n_layer < 1 || sum.n_head_kv < 1 || sum.n_cells != n || sum.data.size() != (size_t) sum.n_layer * sum.n_head_kv * n) {
        refuse("importance: its shape does not agree with " + std::to_string(n) + " cells");
    }
    if (pol.needs_recent() && (recent.n_layer != sum.n_layer || recent.n_head_kv != sum.n_head_kv || recent.n_cells != n ||
                               recent.data.size() != sum.data.size())) {
        refuse("recent: its shape does not agree with the importance, and the policy " + std::string(pol.name) + " looks at it");
    }
    if (params.n_keep < 1 || params.n_keep > n) {
        refuse("n_keep: got " + std::to_string(params.n_keep) + ", expected 1 <= n_keep <= " + std::to_string(n));
    }
    if (!params.layer_share.empty() && (int32_t) params.layer_share.size() != sum.n_layer) {
        refuse("layer_share: got " + std::to_string(params.layer_share.size()) + " layers, expected " + std::to_string(sum.n_layer));
    }
    for (const float x : params.layer_share) {
        if (!(x > 0.0f) || std::isinf(x)) {
            refuse("layer_share: got " + std::to_string(x) + ", expected finite values > 0");
        }
    }
    if (!c.absent.empty() && (int64_t) c.absent.size() != (int64_t) sum.n_layer * n) {
        refuse("absent: got " + std::to_string(c.absent.size()) + " entries, expected n_layer * n_cells");
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
    if (params.n_sink < 0) {
        refuse("n_sink: got " + std::to_string(params.n_sink) + ", expected >= 0");
    }
    if (pol.needs_rows() && !rows) {
        refuse("rows: got none, but the policy " + std::string(pol.name) + " compares keys and values");
    }
    const auto check_values = [&](const head_map & m) {
        for (const float x : m.data) {
            if (!(x >= 0.0f) || std::isinf(x)) {
                refuse("importance: got " + std::to_string(x) + ", expected finite values >= 0");
            }
        }
    };
    if (pol.needs_importance()) {
        check_values(sum);
    }
    if (pol.needs_recent()) {
        check_values(recent);
    }
}

int32_t cells_for_answer(const policy & pol, const cells & c, int32_t n_keep) {
    return pol.combine == combine_rule::mass && !c.ends_with_image() ? std::min(answer_reserve, n_keep / 8) : 0;
}

// What an image is asked later is not known, so the attention that the present question pays its cells says less of their shares.
static void weaken_images(const cells & c, head_map & weight) {
    for (size_t i = 0; i < weight.data.size(); ++i) {
        if (c.is_image((int32_t) (i % c.size()))) {
            weight.data[i] = std::pow(weight.data[i], image_weight_power);
        }
    }
}

plan make_plan(const policy & pol, const plan_params & params, const cells & c, const importance_map & importance, const row_source * rows,
               int32_t n_threads) {
    check(pol, params, c, importance, rows);

    plan p;
    p.n_layer   = importance.sum.n_layer;
    p.n_head_kv = importance.sum.n_head_kv;
    p.n_cells   = c.size();
    p.n_keep    = pol.select == select_rule::all ? p.n_cells : params.n_keep;

    head_map          score = score_cells(pol.score, c, importance);
    const plan_params own   = { p.n_keep, params.n_sink, params.layer_share, params.n_rank_max };
    select_cells(pol.select, pol.ranked(), own, c, score, p);
    if (pol.select == select_rule::cover) {
        cover_runs(own, c, score, *rows, p, n_threads);
    }
    sum_rank_scores(pol.select, own, c, score, p);
    assign_buckets(pol.combine, c, p);
    if (pol.combine == combine_rule::mass) {
        for (const cell_kind kind : c.kind) {
            p.key_weight.push_back(kind == cell_kind::image ? key_weight : 0.0f);
        }
        p.weight = std::move(score);
        weaken_images(c, p.weight);
    }

    return p;
}

}  // namespace elastic
