#include "core/evict_cell.h"

#include <algorithm>
#include <cmath>

namespace elastic {

int32_t evictor::cell(const cells & c, int32_t n_prompt, int32_t offset, int32_t n_sink, const std::vector<float> &) const {
    const int32_t n_last = c.size() - 1;
    const int64_t place  = (int64_t) n_prompt - offset;
    const int32_t fixed  = (int32_t) std::min<int64_t>(std::max<int64_t>(place, n_sink), n_last - 1);
    for (int32_t i = fixed; i < n_last; ++i) {
        if (!c.pinned[i]) {
            return i;
        }
    }
    for (int32_t i = fixed; i >= n_sink; --i) {
        if (!c.pinned[i]) {
            return i;
        }
    }
    return -1;
}

int32_t lowest_evictor::cell(const cells & c, int32_t n_prompt, int32_t offset, int32_t n_sink, const std::vector<float> & total) const {
    const int32_t n_last = c.size() - 1;
    int32_t       best   = -1;
    for (int32_t i = n_sink; i < n_last; ++i) {
        if (!c.pinned[i] && std::isfinite(total[i]) && (best < 0 || total[i] < total[best])) {
            best = i;
        }
    }
    for (int32_t i = n_sink; i < n_last && best < 0; ++i) {
        if (!c.pinned[i] && c.kind[i] == cell_kind::generated) {
            best = i;
        }
    }
    return best >= 0 ? best : evictor::cell(c, n_prompt, offset, n_sink, total);
}

}  // namespace elastic
