#include "core/generate.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace elastic {

static int32_t n_recent(generate_rule rule, int32_t n_cells) {
    return rule == generate_rule::heavy ? std::max(1, n_cells / 2) : per_head_recent;
}

std::vector<int32_t> leaving_candidates(generate_rule rule, const cells & c, int32_t n_sink, const std::vector<float> & total) {
    const auto n_generated = std::count(c.kind.begin(), c.kind.end(), cell_kind::generated);
    const bool spares_text = (rule == generate_rule::per_head || rule == generate_rule::merge) && n_generated <= short_answer;

    std::vector<int32_t> res;
    for (const bool whole_text : { false, true }) {
        for (int32_t i = std::max(n_sink, 0); i < c.size() - n_recent(rule, c.size()); ++i) {
            const bool stays = spares_text && c.kind[i] == cell_kind::text && !std::isfinite(total[i]);
            if (!c.pinned[i] && (whole_text || !stays)) {
                res.push_back(i);
            }
        }
        if (!res.empty()) {
            break;
        }
    }
    return res;
}

int32_t leaving_cell(generate_rule rule, const cells & c, int32_t n_prompt, int32_t offset, int32_t n_sink,
                     const std::vector<float> & total) {
    const int32_t n_last = c.size() - 1;  // the newest cell never leaves

    n_sink = std::max(n_sink, 0);

    const auto may_leave = [&](int32_t i) {
        return i >= n_sink && i < n_last && !c.pinned[i];
    };
    // lowest finite total of the cells in [first, last) that `fits` takes
    const auto lowest = [&](int32_t first, int32_t last, auto fits) {
        int32_t best = -1;
        for (int32_t i = first; i < last; ++i) {
            if (may_leave(i) && fits(i) && std::isfinite(total[i]) && (best < 0 || total[i] < total[best])) {
                best = i;
            }
        }
        return best;
    };
    const auto any = [](int32_t) {
        return true;
    };

    if (rule == generate_rule::keep || n_sink >= n_last) {
        return -1;
    }

    int32_t best = -1;
    if (rule == generate_rule::heavy) {
        best = lowest(n_sink, c.size() - n_recent(rule, c.size()), any);
    }
    if (rule == generate_rule::lowest) {
        best = lowest(n_sink, n_last, any);
        for (int32_t i = n_sink; i < n_last && best < 0; ++i) {
            if (may_leave(i) && c.kind[i] == cell_kind::generated) {
                best = i;
            }
        }
    }
    if (best >= 0) {
        return best;
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

std::vector<float> leaving_scores(const std::vector<float> & others, const float * mass, const float * fading, float decay,
                                  int64_t n_queries) {
    std::vector<float> res(others.size());
    if (!fading) {
        std::transform(others.begin(), others.end(), mass, res.begin(), [](float x, float y) { return x + y; });
        return res;
    }
    const float recent = 1.0f - decay;  // over the sum of all weights, 1/(1 - decay)
    const float all    = 1.0f / (float) n_queries;
    for (size_t i = 0; i < others.size(); ++i) {
        res[i] = others[i] + mass[i] * all + fading[i] * recent;
    }
    return res;
}

// Values >= 0 stand in the order of their bits, and compilers make a vector loop of a minimum of integers, not of one of floats.
static int32_t bits_of(float x) {
    int32_t res;
    std::memcpy(&res, &x, sizeof(res));
    return res;
}

int32_t first_lowest(const std::vector<float> & values, const std::vector<int32_t> & rows, int32_t base) {
    int32_t lowest = INT32_MAX;
    for (const float x : values) {
        lowest = std::min(lowest, bits_of(x));
    }
    int32_t n_lowest = 0, last = 0;
    for (int32_t i = 0; i < (int32_t) values.size(); ++i) {
        const bool is_lowest = bits_of(values[i]) == lowest;
        n_lowest += is_lowest;
        last = is_lowest ? i : last;
    }
    if (n_lowest == 1) {
        return base + last;
    }
    return *std::find_if(rows.begin(), rows.end(), [&](int32_t row) { return bits_of(values[row - base]) == lowest; });
}

}  // namespace elastic
