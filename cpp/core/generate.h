#pragma once

#include "core/policy.h"

namespace elastic {

// Which logical cell leaves when the sequence holds one cell too many while generating; -1: none may leave.
//   n_prompt: cells held right after the prompt (P);  offset: the paper's 25;  n_sink: first cells never leave
//   distance: index P - offset, clamped to [n_sink, n_cells - 2]; the newest cell never leaves
//   score: lowest total[i] among image cells, then the oldest generated cell, then distance; ties to the earlier
// Pinned cells never leave: the next later cell that may leave is taken, then the next earlier.
//   total: importance summed over layers and heads  [n_cells]
int32_t leaving_cell(generate_rule rule, const cells & c, int32_t n_prompt, int32_t offset, int32_t n_sink,
                     const std::vector<float> & total);

}  // namespace elastic
