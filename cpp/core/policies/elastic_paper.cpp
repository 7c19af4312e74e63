// Elastic Cache (Liu et al. 2024, arXiv:2407.18121), section 3: anchors by the attention of a layer, neighbours averaged into them.

#include "core/evict_cell.h"
#include "core/mean_combiner.h"
#include "core/policy.h"
#include "core/sum_scorer.h"
#include "core/top_selector.h"

#include <algorithm>

namespace elastic {

namespace {

// the same for all heads of a layer: their mean
class layer_sum_scorer : public sum_scorer {
  public:
    const char * name() const override { return "frequency_layer"; }
    head_map     score(const score_view & v) const override {
        head_map res = v.importance.sum;
        for (int32_t il = 0; il < v.n_layer(); ++il) {
            average_heads(res, il);
        }
        return res;
    }

  private:
    static void average_heads(head_map & m, int32_t il) {
        for (int32_t i = 0; i < m.n_cells; ++i) {
            double sum = 0.0;
            for (int32_t ih = 0; ih < m.n_head_kv; ++ih) {
                sum += m.row(il, ih)[i];
            }
            m.row(il, 0)[i] = (float) (sum / m.n_head_kv);
        }
        for (int32_t ih = 1; ih < m.n_head_kv; ++ih) {
            std::copy(m.row(il, 0), m.row(il, 0) + m.n_cells, m.row(il, ih));
        }
    }
};

}  // namespace

policy make_elastic_paper() {
    return compose("elastic-paper", "anchors per layer, neighbours averaged into them (Elastic Cache, section 3)",
                   make_part<layer_sum_scorer>(), make_part<uniform_layers>(), make_part<top_selector>(), make_part<mean_combiner>(),
                   make_part<distance_evictor>());
}

}  // namespace elastic
