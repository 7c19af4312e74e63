#include "core/evict_per_head.h"

#include <algorithm>
#include <cmath>

namespace elastic {

std::vector<int32_t> evictable_cells(const cells & c, int32_t n_sink, int32_t n_recent) {
    std::vector<int32_t> res;
    for (int32_t i = std::max(n_sink, 0); i < c.size() - n_recent; ++i) {
        if (!c.pinned[i]) {
            res.push_back(i);
        }
    }
    return res;
}

std::vector<int32_t> per_head_evictor::candidates(const cells & c, int32_t n_sink, const std::vector<float> & total) const {
    const auto all         = evictable_cells(c, n_sink, n_recent);
    const auto n_generated = std::count(c.kind.begin(), c.kind.end(), cell_kind::generated);

    std::vector<int32_t> res;
    for (const int32_t i : all) {
        const bool spared = n_generated <= short_answer && c.kind[i] == cell_kind::text && !std::isfinite(total[i]);
        if (!spared) {
            res.push_back(i);
        }
    }
    return res.empty() ? all : res;
}

int32_t recompress_evictor::reserve(const cells & c, int32_t n_keep) const {
    return c.ends_with_image() ? 0 : std::min(n_reserve, n_keep / 8);
}

}  // namespace elastic
