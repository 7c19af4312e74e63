#include "core/window_scorer.h"

#include "core/pooling.h"

#include <algorithm>

namespace elastic {

head_map window_scorer::score(const score_view & v) const {
    head_map res = v.zeros();
    for (int32_t il = 0; il < v.n_layer(); ++il) {
        for (int32_t ih = 0; ih < v.n_head_kv(); ++ih) {
            const auto pool = pooled(v.importance.recent.row(il, ih), v.n_cells(), n_near);
            std::copy(pool.begin(), pool.end(), res.row(il, ih));
        }
    }
    return res;
}

}  // namespace elastic
