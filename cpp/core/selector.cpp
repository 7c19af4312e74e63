#include "core/selector.h"

namespace elastic {

std::vector<run> selector::runs(const protection & p, const cells & c, int32_t n_keep) const {
    auto res           = split_runs(false, c, p);
    res.front().n_keep = n_keep;
    return res;
}

}  // namespace elastic
