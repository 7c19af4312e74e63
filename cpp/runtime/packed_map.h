#pragma once

// A map per layer, head and cell, without the cells that are masked in a layer, and as one number where all are alike.

#include "core/types.h"

#include <vector>

namespace elastic {

class packed_map {
  public:
    packed_map() = default;
    // masked: [n_layer][n_cells], or empty
    packed_map(const head_map & m, const std::vector<bool> & masked);

    // the map, bit by bit; with the same `masked`
    head_map unpack(const std::vector<bool> & masked) const;

    int64_t n_bytes() const { return (int64_t) (values.data.size() * sizeof(float)); }

  private:
    enum class form { whole, seen, uniform };  // all values, those that are not masked, or one for all of these

    form     kept = form::whole;
    head_map values;               // its data is as long as its form says
    float    value        = 0.0f;  // of all that are not masked
    float    masked_value = 0.0f;
};

}  // namespace elastic
