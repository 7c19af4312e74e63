// Knorm (Devoto et al. 2024, arXiv:2406.11430, "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression").
//
// Keys of low norm tend to receive much attention. Nothing is asked of the graph, so it costs no speed while a prompt is read.
// The paper spares the first two layers; here all layers are compressed.

#include "core/evict_cell.h"
#include "core/policy.h"
#include "core/top_selector.h"
#include "kernels/parallel.h"

#include <cmath>

namespace elastic {

namespace {

// minus the L2 norm of the key
class key_norm_scorer : public scorer {
  public:
    const char * name() const override { return "key_norm"; }
    statistics   needs() const override { return { false, 0, 0.0f, true }; }
    head_map     score(const score_view & v) const override {
        const int32_t d   = v.rows->n_embd_head_k();
        head_map      res = v.zeros();
        parallel_for(v.n_layer(), v.n_threads, [&](int32_t il) {
            std::vector<float> k((size_t) v.n_cells() * d);
            for (int32_t ih = 0; ih < v.n_head_kv(); ++ih) {
                v.rows->load_k(il, ih, k.data());
                for (int32_t i = 0; i < v.n_cells(); ++i) {
                    double sum = 0.0;
                    for (int32_t e = 0; e < d; ++e) {
                        sum += (double) k[(size_t) i * d + e] * k[(size_t) i * d + e];
                    }
                    res.row(il, ih)[i] = -(float) std::sqrt(sum);
                }
            }
        });
        return res;
    }
};

}  // namespace

policy make_knorm() {
    return compose("knorm", "keys of low norm per KV head, nothing is measured (Knorm)", make_part<key_norm_scorer>(),
                   make_part<uniform_layers>(), make_part<top_selector>(), make_part<evict_combiner>(), make_part<lowest_evictor>());
}

}  // namespace elastic
