// PyramidKV (Cai et al. 2024, arXiv:2406.02069): SnapKV, with fewer cells in later layers.
//
// The paper's window is 8 queries; it is SnapKV's 32 here, which the runtime keeps. Where a first layer has fewer cells than its budget,
// the others share what is left in proportion; the paper's code lowers the whole pyramid instead.
// While generating, the cells of lowest score are evicted, summed over layers: those that only early layers hold go first. A long answer
// therefore evens the layers out. The paper drops nothing then.

#include "core/evict_cell.h"
#include "core/policy.h"
#include "core/top_selector.h"
#include "core/window_scorer.h"

namespace elastic {

namespace {

// Budgets beside the window fall arithmetically: the last layer has 1/beta of the mean, the first what makes the mean right.
class pyramid_layers : public layer_budget {
  public:
    const char *       name() const override { return "pyramid"; }
    bool               varies() const override { return true; }
    std::vector<float> shares(int32_t n_layer) const override {
        std::vector<float> res(n_layer, 1.0f);
        for (int32_t il = 0; n_layer > 1 && il < n_layer; ++il) {
            const float way = (float) il / (float) (n_layer - 1);
            res[il]         = (1.0f - way) * (2.0f - 1.0f / beta) + way / beta;
        }
        return res;
    }

    float beta = 20.0f;  // the paper's default
};

}  // namespace

policy make_pyramidkv() {
    return compose("pyramidkv", "as snapkv, with fewer cells in later layers (PyramidKV)", make_part<window_scorer>(),
                   make_part<pyramid_layers>(), make_part<top_selector>("window_top", window_size), make_part<evict_combiner>(),
                   make_part<lowest_evictor>());
}

}  // namespace elastic
