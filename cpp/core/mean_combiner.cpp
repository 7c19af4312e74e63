#include "core/mean_combiner.h"

#include <cstdlib>

namespace elastic {

void mean_combiner::join(const head_plan & h, int32_t * bucket) const {
    std::vector<int32_t> anchors;  // ranks, in logical order
    for (int32_t j = 0; j < h.n_keep; ++j) {
        if (h.kept[j] >= 0 && !h.c.pinned[h.kept[j]]) {
            anchors.push_back(j);
        }
    }
    if (anchors.empty()) {
        return;
    }
    std::sort(anchors.begin(), anchors.end(), [&](int32_t a, int32_t b) { return h.kept[a] < h.kept[b]; });
    size_t a = 0;
    for (int32_t i = 0; i < h.c.size(); ++i) {
        while (a + 1 < anchors.size() && std::abs(h.kept[anchors[a + 1]] - i) < std::abs(h.kept[anchors[a]] - i)) {
            ++a;
        }
        if (bucket[i] < 0) {
            bucket[i] = anchors[a];
        }
    }
}

}  // namespace elastic
