#include "core/top_selector.h"

#include <algorithm>

namespace elastic {

choice choose_highest(const run & r, const float * score) {
    choice               res;
    std::vector<int32_t> free;
    for (int32_t i = 0; i < (int32_t) r.cells.size(); ++i) {
        (r.stay[i] ? res.kept : free).push_back(i);
    }
    const auto higher = [&](int32_t a, int32_t b) {
        const float x = score[r.cells[a]], y = score[r.cells[b]];
        return x != y ? x > y : a < b;
    };
    const int32_t n = r.n_keep - r.n_stay;
    if (n < (int32_t) free.size()) {
        std::nth_element(free.begin(), free.begin() + n, free.end(), higher);
        free.resize(n);
    }
    res.kept.insert(res.kept.end(), free.begin(), free.end());
    std::sort(res.kept.begin(), res.kept.end());
    return res;
}

int32_t top_selector::n_recent(int32_t n_keep) const {
    return std::max(1, std::min(n_window, n_keep / 2));
}

}  // namespace elastic
