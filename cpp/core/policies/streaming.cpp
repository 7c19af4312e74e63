// StreamingLLM (Xiao et al. 2023, arXiv:2309.17453): sinks and the most recent cells.

#include "core/evict_cell.h"
#include "core/policy.h"
#include "core/top_selector.h"

#include <numeric>

namespace elastic {

namespace {

class recency_scorer : public scorer {
  public:
    const char * name() const override { return "recency"; }
    head_map     score(const score_view & v) const override {
        head_map res = v.zeros();
        for (int32_t il = 0; il < v.n_layer(); ++il) {
            for (int32_t ih = 0; ih < v.n_head_kv(); ++ih) {
                std::iota(res.row(il, ih), res.row(il, ih) + v.n_cells(), 0.0f);
            }
        }
        return res;
    }
};

}  // namespace

policy make_streaming() {
    return compose("local", "sinks and the most recent cells stay (StreamingLLM)", make_part<recency_scorer>(), make_part<uniform_layers>(),
                   make_part<top_selector>(), make_part<evict_combiner>(), make_part<distance_evictor>());
}

}  // namespace elastic
