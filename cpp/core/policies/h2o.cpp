// H2O (Zhang et al. 2023, arXiv:2306.14048): half heavy hitters, half recent cells, per KV head.

#include "core/evict_per_head.h"
#include "core/policy.h"
#include "core/sum_scorer.h"
#include "core/top_selector.h"

#include <algorithm>
#include <limits>

namespace elastic {

namespace {

// the lowest score among all but the most recent half, scores updated at every step
class heavy_evictor : public evictor {
  public:
    const char *         name() const override { return "heavy"; }
    statistics           needs() const override { return { true, 0, 0.0f, false }; }
    bool                 per_head() const override { return true; }
    std::vector<int32_t> candidates(const cells & c, int32_t n_sink, const std::vector<float> &) const override {
        return evictable_cells(c, n_sink, std::max(1, c.size() / 2));
    }
};

}  // namespace

policy make_h2o() {
    // a window as large as half of the kept cells
    return compose("h2o", "half heavy hitters, half recent, per KV head, scores updated at every token (H2O)", make_part<sum_scorer>(),
                   make_part<uniform_layers>(), make_part<top_selector>("heavy_recent", std::numeric_limits<int32_t>::max()),
                   make_part<evict_combiner>(), make_part<heavy_evictor>());
}

}  // namespace elastic
