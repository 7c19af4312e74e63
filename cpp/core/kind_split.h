#pragma once

// How a budget is split between text and images.

#include "core/runs.h"

namespace elastic {

struct split {
    int32_t n_text  = 0;
    int32_t n_image = 0;
};
// All text stays while it leaves image cells at least half of their proportional share
// (n_keep*n_image/(2*n_cells), rounded down); otherwise the image gets that share and text the rest.
split split_budget(int32_t n_keep, int32_t n_text, int32_t n_image);

// And where there are earlier turns (cells::has_past): the image keeps the cells that it has, as far as the present question and the
// older text's share, in proportion to the tokens it stands for, leave them; half of the image's own share at least.
split split_with_past(int32_t n_keep, const cells & c);

// shares n_keep between runs by that split, corrected so that the protected cells of either kind fit
void share_by_kind(std::vector<run> & runs, const cells & c, int32_t n_keep);

}  // namespace elastic
