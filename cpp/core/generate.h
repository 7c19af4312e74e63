#pragma once

// What a sequence evicts while generating, for the runtime.

#include "core/evictor.h"

namespace elastic {

// Which logical cell is evicted when the sequence holds one cell too many while generating; -1: none may be.
//   n_prompt: cells held right after the prompt;  n_sink: the first cells are never evicted, nor is the newest, nor a pinned one
//   total: score summed over layers and heads, infinite where it says nothing  [n_cells]
int32_t cell_to_evict(const evictor & e, const cells & c, int32_t n_prompt, int32_t offset, int32_t n_sink,
                      const std::vector<float> & total);

// The cells among which each head loses one of its own, in logical order; empty: none may be evicted.
std::vector<int32_t> eviction_candidates(const evictor & e, const cells & c, int32_t n_sink, const std::vector<float> & total);

// By what the cells of one head are evicted, the lowest first, added to `others`: their attention until now (importance), or, where the
// recent one is kept too (decayed, by `decay` per query, else nullptr), the share of either in all that n_queries gave (1 each). It is the
// score of expected_attention_scorer without its means over neighbours.
std::vector<float> eviction_scores(const std::vector<float> & others, const float * importance, const float * decayed, float decay,
                                   int64_t n_queries);

// the first of `rows` with the lowest value >= 0; values of rows from `base` on, infinite for others
int32_t first_lowest(const std::vector<float> & values, const std::vector<int32_t> & rows, int32_t base);

}  // namespace elastic
