#pragma once

#include <cstdint>

namespace elastic {

// A budget is a fraction (0 < f <= 1) of the tokens seen, or a number of cells (n > 1, whole).
// The one place where a fraction becomes cells: ceil(f * n_tokens), computed so that 0.07 * 100 is 7;
// at most n_tokens. Throws elastic::error on 0, negatives, NaN, inf, fractions above 1, and n_tokens < 0.
struct budget {
    double  fraction = 1.0;  // used when n_cells == 0
    int32_t n_cells  = 0;

    static budget from_value(double value);  // <= 1.0: a fraction; > 1 must be whole: cells
    int32_t       cells_for(int64_t n_tokens) const;
};

}  // namespace elastic
