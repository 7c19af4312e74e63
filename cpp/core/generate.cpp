#include "core/generate.h"

#include <algorithm>

namespace elastic {

int32_t leaving_cell(generate_rule rule, const cells & c, int32_t n_prompt, int32_t offset, int32_t n_sink,
                     const std::vector<float> & total) {
    const int32_t n_last = c.size() - 1;  // the newest cell never leaves

    n_sink = std::max(n_sink, 0);

    const auto may_leave = [&](int32_t i) {
        return i >= n_sink && i < n_last && !c.pinned[i];
    };

    if (rule == generate_rule::keep || n_sink >= n_last) {
        return -1;
    }

    if (rule == generate_rule::score) {
        int32_t best = -1;
        for (int32_t i = n_sink; i < n_last; ++i) {
            if (may_leave(i) && c.kind[i] == cell_kind::image && (best < 0 || total[i] < total[best])) {
                best = i;
            }
        }
        for (int32_t i = n_sink; i < n_last && best < 0; ++i) {
            if (may_leave(i) && c.kind[i] == cell_kind::generated) {
                best = i;
            }
        }
        if (best >= 0) {
            return best;
        }
    }

    const int64_t place = (int64_t) n_prompt - offset;
    const int32_t fixed = (int32_t) std::min<int64_t>(std::max<int64_t>(place, n_sink), n_last - 1);
    for (int32_t i = fixed; i < n_last; ++i) {
        if (may_leave(i)) {
            return i;
        }
    }
    for (int32_t i = fixed; i >= n_sink; --i) {
        if (may_leave(i)) {
            return i;
        }
    }
    return -1;
}

}  // namespace elastic
