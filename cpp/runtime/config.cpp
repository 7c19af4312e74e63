#include "runtime/config.h"

#include <cmath>
#include <string>

namespace elastic {

config make_config(const elastic_params & params) {
    config cfg;
    cfg.pol  = find_policy(params.policy ? params.policy : "");
    cfg.keep = budget::from_value(params.budget);

    const auto at_least = [](const char * name, int32_t value, int32_t low) {
        if (value < low) {
            throw error("[elastic] " + std::string(name) + ": got " + std::to_string(value) + ", expected >= " + std::to_string(low));
        }
        return value;
    };
    cfg.n_sink    = at_least("n_sink", params.n_sink, 0);
    cfg.offset    = at_least("offset", params.offset, 0);
    cfg.min_cells = at_least("min_cells", params.min_cells, 1);
    cfg.n_threads = at_least("n_threads", params.n_threads, 0);
    cfg.max_cells = at_least("max_cells", params.max_cells, 0);
    cfg.record    = params.record;

    cfg.overdraft     = at_least("overdraft", params.overdraft, -1);
    cfg.n_checkpoints = at_least("n_checkpoints", params.n_checkpoints, 0);
    cfg.n_question    = at_least("n_question", params.n_question, 0);
    if (at_least("n_layer_share", params.n_layer_share, 0) > 0 && !params.layer_share) {
        throw error("[elastic] layer_share: got NULL, expected " + std::to_string(params.n_layer_share) + " values");
    }
    if (params.layers == ELASTIC_LAYERS_GIVEN) {
        cfg.layer_share.assign(params.layer_share, params.layer_share + params.n_layer_share);
    }

    cfg.release_memory = params.release_memory;

    if (cfg.max_cells > 0 && cfg.max_cells < cfg.n_sink + 2) {
        throw error("[elastic] max_cells: got " + std::to_string(cfg.max_cells) +
                    ", expected at least n_sink + 2 = " + std::to_string(cfg.n_sink + 2) + ", or 0 for no cap");
    }
    if (cfg.max_cells > 0 && cfg.pol.keeps_all()) {
        throw error("[elastic] max_cells: got " + std::to_string(cfg.max_cells) + " with the policy " + cfg.pol.name +
                    ", which keeps every cell; choose another policy");
    }
    if (!cfg.layer_share.empty() && !cfg.pol.can_vary_layers()) {
        throw error("[elastic] layer_share: got it with the policy " + std::string(cfg.pol.name) +
                    ", which takes none; choose another policy");
    }
    if (!cfg.layer_share.empty() && cfg.max_cells > 0) {
        throw error("[elastic] layer_share: got it with max_cells = " + std::to_string(cfg.max_cells) +
                    ", under which all layers keep as many cells; choose one of them");
    }
    return cfg;
}

void check_layers(const config & cfg, int32_t n_layer) {
    for (const float x : cfg.layer_share) {
        if (!(x > 0.0f) || std::isinf(x)) {
            throw error("[elastic] layer_share: got " + std::to_string(x) + ", expected finite values > 0");
        }
    }
    if (!cfg.layer_share.empty() && (int32_t) cfg.layer_share.size() != n_layer) {
        throw error("[elastic] layer_share: got " + std::to_string(cfg.layer_share.size()) + " layers, expected " +
                    std::to_string(n_layer));
    }
}

}  // namespace elastic
