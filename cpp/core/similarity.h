#pragma once

#include <cstdint>
#include <vector>

namespace elastic {

// For each query row the key row of highest dot product, ties to the lower index. Rows of `keys` are
// expected to be of unit length, so that this is the highest cosine whatever the length of the query.
//   queries [n_queries][d], keys [n_keys][d], best [n_queries] (0 when n_keys is 1; n_keys >= 1)
void most_similar(const float * queries, int32_t n_queries, const float * keys, int32_t n_keys, int32_t d, int32_t * best);

}  // namespace elastic
