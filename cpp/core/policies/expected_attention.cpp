// Expected Attention (Devoto et al. 2025, arXiv:2510.00636; kvpress' ExpectedAttentionPress), without a model of the queries.
//
// The paper takes future queries for Gaussian, so the attention expected of a key is exp(mean logit + variance/2), normalised; times the
// norm of the value it says what dropping the cell costs. The core sees no queries. What it takes instead is the mean of the attention
// that the last queries paid, which estimates the same expectation from samples. What differs:
//   - the distribution is that of the last 32 queries at their own positions; the paper takes mean and covariance over the whole
//     prompt and averages the rotation over the next 512 positions
//   - the expectation is that of the normalised attention, the paper normalises the expected exponentials
//   - the first n_sink cells stay by the option of that name (4 in kvpress, and left out of the statistics there)

#include "core/evict_cell.h"
#include "core/policy.h"
#include "core/top_selector.h"
#include "core/window_scorer.h"
#include "kernels/parallel.h"

#include <algorithm>
#include <cmath>

namespace elastic {

namespace {

class window_mean_scorer : public scorer {
  public:
    const char * name() const override { return "window_mean"; }
    statistics   needs() const override { return { true, window_size, 0.0f, true }; }
    bool         is_attention() const override { return true; }
    head_map     score(const score_view & v) const override {
        const int32_t n = v.n_cells(), d = v.rows->n_embd_head_v();
        head_map      res = v.zeros();
        parallel_for(v.n_layer(), v.n_threads, [&](int32_t il) {
            std::vector<float> values((size_t) n * d);
            for (int32_t ih = 0; ih < v.n_head_kv(); ++ih) {
                v.rows->load_v(il, ih, values.data());
                for (int32_t i = 0; i < n; ++i) {
                    double sum = 0.0;
                    for (int32_t e = 0; e < d; ++e) {
                        sum += (double) values[(size_t) i * d + e] * values[(size_t) i * d + e];
                    }
                    // of the queries that see the cell: the newest are seen by few
                    const double mean  = v.importance.recent.row(il, ih)[i] / (double) std::min(window_size, n - i);
                    res.row(il, ih)[i] = (float) ((mean + epsilon) * std::sqrt(sum));
                }
            }
        });
        return res;
    }

    double epsilon = 0.0;  // kvpress' default; above 0 it keeps large values that nothing attends to
};

}  // namespace

policy make_expected_attention() {
    return compose("expected-attention", "attention expected of a cell times the norm of its value (Expected Attention)",
                   make_part<window_mean_scorer>(), make_part<uniform_layers>(), make_part<top_selector>(), make_part<evict_combiner>(),
                   make_part<lowest_evictor>());
}

}  // namespace elastic
