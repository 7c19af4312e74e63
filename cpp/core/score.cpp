#include "core/score.h"

#include <algorithm>

namespace elastic {

static void average_heads(head_map & m) {
    for (int32_t il = 0; il < m.n_layer; ++il) {
        float * first = m.row(il, 0);
        for (int32_t i = 0; i < m.n_cells; ++i) {
            double sum = 0.0;
            for (int32_t ih = 0; ih < m.n_head_kv; ++ih) {
                sum += m.row(il, ih)[i];
            }
            first[i] = (float) (sum / m.n_head_kv);
        }
        for (int32_t ih = 1; ih < m.n_head_kv; ++ih) {
            std::copy(first, first + m.n_cells, m.row(il, ih));
        }
    }
}

head_map score_cells(score_rule rule, const head_map & importance) {
    head_map res = importance;
    switch (rule) {
        case score_rule::none:
        case score_rule::frequency:
            break;
        case score_rule::frequency_layer:
            average_heads(res);
            break;
        case score_rule::recency:
            for (int32_t il = 0; il < res.n_layer; ++il) {
                for (int32_t ih = 0; ih < res.n_head_kv; ++ih) {
                    for (int32_t i = 0; i < res.n_cells; ++i) {
                        res.row(il, ih)[i] = (float) i;
                    }
                }
            }
            break;
    }
    return res;
}

}  // namespace elastic
