#include "core/image_first_selector.h"

#include "core/kind_split.h"
#include "core/top_selector.h"

namespace elastic {

std::vector<run> image_first_selector::runs(const protection & p, const cells & c, int32_t n_keep) const {
    auto res = split_runs(true, c, p);
    share_by_kind(res, c, n_keep);
    return res;
}

choice image_first_selector::choose(const run & r, const float * score, head_rows &) const {
    return choose_highest(r, score);
}

}  // namespace elastic
