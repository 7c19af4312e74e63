#pragma once

// Runs of neighbouring cells of one kind. A run keeps the same number of cells in all heads, so rank j is of one kind everywhere.

#include "core/types.h"

namespace elastic {

// The newest tokens of a text, and the newest of an answer before they count as said. Chosen on the dev scenes and texts with the
// embedded model. The runtime looks at it under every policy.
constexpr int32_t text_recent = 16;

// cells that do not depend on a score  [n_cells] each
struct protection {
    std::vector<uint8_t> stay;      // 1: stays
    std::vector<uint8_t> verbatim;  // 1: none may join it

    int32_t n_stay() const;
};

struct run {
    std::vector<int32_t> cells;     // logical indices, ascending
    std::vector<uint8_t> stay;      // [cells], as in protection
    std::vector<uint8_t> verbatim;  // [cells]
    bool                 image    = false;
    int32_t              n_stay   = 0;
    int32_t              n_keep   = 0;
    int64_t              n_tokens = 0;  // that its unprotected cells stand for

    bool    whole() const { return n_keep == (int32_t) cells.size(); }
    // its first cells that stay whatever their score
    int32_t n_leading() const;
};

// all cells as one run, or as runs of one kind each, in logical order
std::vector<run> split_runs(bool split_kinds, const cells & c, const protection & p);

// Shares n_keep between runs: each its protected cells, then in proportion to the tokens that the rest stands for,
// rounded down, what is left over going to the earlier ones.
void share_cells(std::vector<run *> & runs, int32_t n_keep);

}  // namespace elastic
