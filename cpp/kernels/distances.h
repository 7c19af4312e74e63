#pragma once

// Distances between cells, in keys and values. A cell has to be compared with all anchors, of which few are nearer than what it
// has found already: a quick bound tells which, and their distances are computed exactly.

#include <cstddef>
#include <cstdint>
#include <vector>

namespace elastic {

// as many anchors are compared at once with as many cells
constexpr int32_t N_ANCHORS = 16;
constexpr int32_t N_CELLS   = 8;

// A point per cell: its key and its value side by side, each less its mean and divided by the root of its variance in these cells.
class kv_points {
  public:
    // of the given rows of k [.., d_k] and v [.., d_v]; memory is kept from call to call
    void fill(const std::vector<int32_t> & cells, const std::vector<float> & k, int32_t d_k, const std::vector<float> & v, int32_t d_v);

    // squared distance between two cells
    float distance(int32_t i, int32_t j) const;

  private:
    friend class anchor_block;

    int32_t            n = 0;
    int32_t            d = 0;
    std::vector<float> data;   // [n][d]
    std::vector<float> norms;  // squared, [n]

    const float * row(int32_t i) const { return data.data() + (size_t) i * d; }

    void put(const std::vector<int32_t> & cells, const std::vector<float> & x, int32_t d_x, int32_t first);
};

// up to N_ANCHORS anchors side by side
class anchor_block {
  public:
    void set(const kv_points & points, const int32_t * anchors, int32_t n);

    // bounds below the squared distances of up to N_CELLS cells; any[q]: one of cell q is below than[q]
    void bound(const kv_points & points, const int32_t * cells, int32_t n_cells, const float * than, float (*dst)[N_ANCHORS],
               bool * any) const;

  private:
    float              norms[N_ANCHORS];  // squared
    std::vector<float> data;              // [d][N_ANCHORS]
};

}  // namespace elastic
