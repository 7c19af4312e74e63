#include "core/combine.h"

#include <algorithm>
#include <cstdlib>

namespace elastic {

static void assign_nearest(const cells & c, const int32_t * kept, int32_t n_keep, int32_t * bucket) {
    std::vector<int32_t> anchors;  // ranks
    for (int32_t j = 0; j < n_keep; ++j) {
        if (!c.pinned[kept[j]]) {
            anchors.push_back(j);
        }
    }
    if (anchors.empty()) {
        return;
    }
    size_t a = 0;
    for (int32_t i = 0; i < c.size(); ++i) {
        while (a + 1 < anchors.size() && std::abs(kept[anchors[a + 1]] - i) < std::abs(kept[anchors[a]] - i)) {
            ++a;
        }
        if (bucket[i] < 0) {
            bucket[i] = anchors[a];
        }
    }
}

void assign_buckets(combine_rule rule, const cells & c, plan & p) {
    // what the selection found already (cover) stays
    p.bucket.resize((size_t) p.n_layer * p.n_head_kv * p.n_cells, -1);

    for (int32_t il = 0; il < p.n_layer; ++il) {
        for (int32_t ih = 0; ih < p.n_head_kv; ++ih) {
            int32_t *       bucket = p.bucket.data() + ((size_t) il * p.n_head_kv + ih) * p.n_cells;
            const int32_t * kept   = p.kept_row(il, ih);
            if (rule != combine_rule::mass) {
                std::fill(bucket, bucket + p.n_cells, -1);
            }
            for (int32_t j = 0; j < p.n_keep; ++j) {
                if (kept[j] >= 0) {
                    bucket[kept[j]] = j;
                }
            }
            if (rule == combine_rule::nearest_mean) {
                assign_nearest(c, kept, p.n_keep, bucket);
            }
        }
    }
}

}  // namespace elastic
