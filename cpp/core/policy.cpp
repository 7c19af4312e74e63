#include "core/policy.h"

namespace elastic {

statistics policy::needs() const {
    return score->needs() | select->needs() | combine->needs() | generate->needs();
}

policy compose(std::string name, std::string summary, part<scorer> score, part<layer_budget> layers, part<selector> select,
               part<combiner> combine, part<evictor> generate) {
    policy     res{ std::move(name),   std::move(summary), std::move(score),   std::move(layers),
                std::move(select), std::move(combine), std::move(generate) };
    const auto refuse = [&](const std::string & what) {
        throw error("[policy] " + res.name + ": " + what);
    };
    const auto quoted = [](const auto & p) {
        return std::string("\"") + p->name() + "\"";
    };
    if (!res.score || !res.layers || !res.select || !res.combine || !res.generate) {
        refuse("a part is missing");
    }
    res.needs();  // refuses two forms of recent attention

    const bool is_attention = res.score->is_attention();
    if (res.combine->weighs_scores() && !is_attention) {
        refuse("the combiner " + quoted(res.combine) + " weighs cells by the attention expected of them, but the scores of " +
               quoted(res.score) + " are not attention");
    }
    if (res.select->weighs_scores() && !is_attention) {
        refuse("the selector " + quoted(res.select) + " multiplies scores by distances, but the scores of " + quoted(res.score) +
               " are not attention");
    }
    if (res.ranked() && !res.select->can_rank()) {
        refuse("the evictor " + quoted(res.generate) + " goes by ranks in the order of scores, which the selector " + quoted(res.select) +
               " does not give");
    }
    if (res.keeps_all() && (res.evicts() || res.merges() || res.varies_layers())) {
        refuse("the selector " + quoted(res.select) + " keeps every cell, so nothing may be evicted or merged, in no layer");
    }
    return res;
}

policy with_scorer(policy pol, part<scorer> score) {
    return compose(pol.name, pol.summary, std::move(score), pol.layers, pol.select, pol.combine, pol.generate);
}

int32_t cells_for_answer(const policy & pol, const cells & c, int32_t n_keep) {
    return pol.generate->reserve(c, n_keep);
}

}  // namespace elastic
