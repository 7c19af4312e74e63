#include "core/biased_combiner.h"

namespace elastic {

void biased_combiner::join(const head_plan & h, int32_t * bucket) const {
    const bool text_too = merges_past_text || !h.c.has_past();
    for (int32_t i = 0; i < h.c.size(); ++i) {
        if (bucket[i] < 0 && h.nearest[i] >= 0 && (text_too || h.c.is_image(i))) {
            bucket[i] = bucket[h.nearest[i]];
        }
    }
}

void biased_combiner::weigh(const cells & c, head_map score, plan & p) const {
    for (int32_t i = 0; i < c.size(); ++i) {
        p.key_weight.push_back(c.is_image(i) ? key_weight : 0.0f);
    }
    p.weight = std::move(score);
}

}  // namespace elastic
