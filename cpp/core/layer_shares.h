#pragma once

#include <cstdint>
#include <vector>

namespace elastic {

// Shares kept cells between the layers: n_average times their number in all, or as many as there is room for; each layer in
// proportion to its share (rounded down, what is left over to those of the largest share), at least one, and never more than its
// room. Equal shares, and room enough: n_average each.
//   share, room: [n_layer]
std::vector<int32_t> cells_of_layers(int32_t n_average, const std::vector<float> & share, const std::vector<int32_t> & room);

}  // namespace elastic
