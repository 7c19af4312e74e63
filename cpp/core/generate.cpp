#include "core/generate.h"

#include <algorithm>
#include <cstring>

namespace elastic {

int32_t cell_to_evict(const evictor & e, const cells & c, int32_t n_prompt, int32_t offset, int32_t n_sink,
                      const std::vector<float> & total) {
    n_sink = std::max(n_sink, 0);
    return e.evicts() && n_sink < c.size() - 1 ? e.cell(c, n_prompt, offset, n_sink, total) : -1;
}

std::vector<int32_t> eviction_candidates(const evictor & e, const cells & c, int32_t n_sink, const std::vector<float> & total) {
    return e.candidates(c, n_sink, total);
}

std::vector<float> eviction_scores(const std::vector<float> & others, const float * importance, const float * decayed, float decay,
                                   int64_t n_queries) {
    std::vector<float> res(others.size());
    if (!decayed) {
        std::transform(others.begin(), others.end(), importance, res.begin(), [](float x, float y) { return x + y; });
        return res;
    }
    const float recent = 1.0f - decay;  // over the sum of all weights, 1/(1 - decay)
    const float all    = 1.0f / (float) n_queries;
    for (size_t i = 0; i < others.size(); ++i) {
        res[i] = others[i] + importance[i] * all + decayed[i] * recent;
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
