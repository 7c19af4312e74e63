#include "core/policy.h"

#include "core/combine.h"
#include "core/score.h"
#include "core/select.h"

#include <cmath>

namespace elastic {

const std::vector<policy> & policies() {
    using s = score_rule;
    using k = select_rule;
    using c = combine_rule;
    using g = generate_rule;

    static const std::vector<policy> table = {
        // clang-format off
        { "full",          s::none,            k::all,         c::evict,        g::keep,     "every cell stays" },
        { "local",         s::recency,         k::top,         c::evict,        g::distance, "sinks and the most recent cells stay (StreamingLLM)" },
        { "elastic-paper", s::frequency_layer, k::top,         c::nearest_mean, g::distance, "anchors per layer, neighbours averaged into them (Elastic Cache, section 3)" },
        { "elastic-evict", s::frequency,       k::image_first, c::evict,        g::score,    "text stays, image cells per KV head, the others are lost" },
        { "elastic",       s::frequency,       k::image_first, c::mass,         g::score,    "text stays, image cells per KV head, the others are merged and keep their attention mass" },
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

static void check(const policy & pol, const plan_params & params, const cells & c, const head_map & importance, const key_source * keys) {
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
    if (importance.n_layer < 1 || importance.n_head_kv < 1 || importance.n_cells != n ||
        importance.data.size() != (size_t) importance.n_layer * importance.n_head_kv * n) {
        refuse("importance: its shape does not agree with " + std::to_string(n) + " cells");
    }
    if (params.n_keep < 1 || params.n_keep > n) {
        refuse("n_keep: got " + std::to_string(params.n_keep) + ", expected 1 <= n_keep <= " + std::to_string(n));
    }
    if (params.n_sink < 0) {
        refuse("n_sink: got " + std::to_string(params.n_sink) + ", expected >= 0");
    }
    if (pol.combine == combine_rule::mass && !keys) {
        refuse("keys: got none, but the policy " + std::string(pol.name) + " compares keys");
    }
    if (pol.needs_importance()) {
        for (const float x : importance.data) {
            if (!(x >= 0.0f) || std::isinf(x)) {
                refuse("importance: got " + std::to_string(x) + ", expected finite values >= 0");
            }
        }
    }
}

plan make_plan(const policy & pol, const plan_params & params, const cells & c, const head_map & importance, const key_source * keys,
               int32_t n_threads) {
    check(pol, params, c, importance, keys);

    plan p;
    p.n_layer   = importance.n_layer;
    p.n_head_kv = importance.n_head_kv;
    p.n_cells   = c.size();
    p.n_keep    = pol.select == select_rule::all ? p.n_cells : params.n_keep;

    select_cells(pol.select, params, c, score_cells(pol.score, importance), p);
    assign_buckets(pol.combine, c, keys, p, n_threads);

    return p;
}

}  // namespace elastic
