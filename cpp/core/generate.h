#pragma once

#include "core/policy.h"

namespace elastic {

// Which logical cell leaves when the sequence holds one cell too many while generating; -1: none may leave.
//   n_prompt: cells held right after the prompt (P);  offset: the paper's 25;  n_sink: first cells never leave
//   distance: index P - offset, clamped to [n_sink, n_cells - 2]; the newest cell never leaves
//   lowest:   lowest finite total[i], then the oldest generated cell, then distance; ties to the earlier
//   heavy:    lowest total[i] among all but the most recent half
// Pinned cells never leave: distance takes the next later cell that may leave, then the next earlier.
//   total: score summed over layers and heads, infinite where it says nothing  [n_cells]
int32_t leaving_cell(generate_rule rule, const cells & c, int32_t n_prompt, int32_t offset, int32_t n_sink,
                     const std::vector<float> & total);

// The cells among which each head loses one of its own, in logical order; empty: none may leave.
//   heavy:    all but sinks, pinned cells and the most recent half
//   per_head: all but sinks, pinned cells and the per_head_recent newest; in a short answer also not the text whose
//             total is infinite (it was kept whole, or newest of a text), unless nothing else is left. A short answer needs the whole
//             question; a long one has taken from it what it needs, and the places are worth more to the image
std::vector<int32_t> leaving_candidates(generate_rule rule, const cells & c, int32_t n_sink, const std::vector<float> & total);

// By what the cells of one head may leave, the lowest first, added to `others`: their attention until now (mass), or, where the recent
// one is kept too (fading, by `decay` per query, else nullptr), the share of either in all that n_queries gave (1 each). It is the
// score of score_rule::by_kind without its means over neighbors.
std::vector<float> leaving_scores(const std::vector<float> & others, const float * mass, const float * fading, float decay,
                                  int64_t n_queries);

// the first of `rows` with the lowest value >= 0; values of rows from `base` on, infinite for others
int32_t first_lowest(const std::vector<float> & values, const std::vector<int32_t> & rows, int32_t base);

}  // namespace elastic
