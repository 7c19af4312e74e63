#include "core/policy.h"

#include <algorithm>

namespace elastic {

// One line for each policy; make_NAME() is defined in policies/NAME.cpp.
// clang-format off
#define ELASTIC_POLICIES(ADD) \
    ADD(full)                 \
    ADD(random)               \
    ADD(streaming)            \
    ADD(h2o)                  \
    ADD(snapkv)               \
    ADD(pyramidkv)            \
    ADD(knorm)                \
    ADD(expected_attention)   \
    ADD(elastic_paper)        \
    ADD(elastic_evict)        \
    ADD(elastic)
// clang-format on

#define ELASTIC_DECLARE(name) policy make_##name();
#define ELASTIC_MAKE(name) make_##name(),

ELASTIC_POLICIES(ELASTIC_DECLARE)

const std::vector<policy> & policies() {
    static const std::vector<policy> table = { ELASTIC_POLICIES(ELASTIC_MAKE) };
    return table;
}

const policy & find_policy(const std::string & name) {
    std::string names;
    for (const auto & p : policies()) {
        if (name == p.name) {
            return p;
        }
        names += (names.empty() ? "" : ", ") + p.name;
    }
    throw error("[policy] got \"" + name + "\", expected one of " + names);
}

statistics recorded_statistics() {
    statistics res;
    for (const auto & p : policies()) {
        const auto own = p.needs();
        res            = { res.sum || own.sum, std::max(res.n_window, own.n_window), std::max(res.decay, own.decay), res.rows || own.rows };
    }
    return res;
}

}  // namespace elastic
