#include "core/budget.h"

#include "core/types.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace elastic {

budget budget::from_value(double value) {
    const auto refuse = [&](const char * expected) {
        char text[32];
        snprintf(text, sizeof(text), "%g", value);
        throw error(std::string("[budget] got ") + text + ", expected " + expected);
    };
    if (!std::isfinite(value) || value <= 0.0) {
        refuse("a fraction 0 < f <= 1, or a whole number of cells > 1");
    }

    budget res;
    if (value <= 1.0) {
        res.fraction = value;
        return res;
    }
    if (value != std::floor(value) || value > INT32_MAX) {
        refuse("a whole number of cells (fractions end at 1)");
    }
    res.n_cells = (int32_t) value;
    return res;
}

int32_t budget::cells_for(int64_t n_tokens) const {
    if (n_tokens < 0 || n_tokens > INT32_MAX) {
        throw error("[budget] n_tokens: got " + std::to_string(n_tokens) + ", expected 0 <= n_tokens < 2^31");
    }
    if (n_cells > 0) {
        return (int32_t) std::min<int64_t>(n_cells, n_tokens);
    }
    // a product that is whole but for its last bits counts as whole: ceil(0.07 * 100) is 7
    const double exact = fraction * (double) n_tokens;
    const double near  = std::nearbyint(exact);
    const double cells = std::fabs(exact - near) <= 1e-12 * exact ? near : std::ceil(exact);
    return (int32_t) std::min<int64_t>(std::max<int64_t>((int64_t) cells, 1), n_tokens);
}

}  // namespace elastic
