#include "runtime/graph_sums.h"

#include "llama-batch.h"

namespace elastic {

graph_sums::graph_sums(attention_graph & owner, const llm_graph_result * graph, bool wanted, bool has_bias)
    : wanted(wanted), has_bias(has_bias), version(owner.on_device.version()), owner(owner), graph(graph), graphs(owner.graphs) {
    (*graphs)[graph] = this;
}

graph_sums::~graph_sums() {
    const auto it = graphs->find(graph);
    if (it != graphs->end() && it->second == this) {
        graphs->erase(it);
    }
}

void graph_sums::set_input(const llama_ubatch * ubatch) {
    owner.parts.bias.upload();
    for (const bool by_sum : { false, true }) {
        if (ggml_tensor * t = weights[by_sum]) {
            std::vector<float> data(ggml_nelements(t));
            owner.set_weights(data.data(), *ubatch, t->ne[2], t->ne[3], by_sum);
            ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t));
        }
    }
    size_t n = 0;
    for (const auto & layer : layers) {
        n += layer.tensor ? 0 : layer.n();
    }
    float * next = n > 0 ? owner.reserve_sums(n) : nullptr;
    for (auto & layer : layers) {
        layer.op.sums = layer.tensor ? nullptr : next;
        next += layer.tensor ? 0 : layer.n();
    }
}

bool graph_sums::can_reuse(const llm_graph_params & params) {
    if (wanted != owner.wants_sums(params.ubatch) || has_bias != owner.has_bias() || version != owner.on_device.version()) {
        return false;
    }
    const ggml_tensor * t = weights[0] ? weights[0] : weights[1];
    return !t || ggml_nelements(t) == owner.n_sums(params.ubatch) * t->ne[2] * (int64_t) params.ubatch.n_tokens;
}

}  // namespace elastic
