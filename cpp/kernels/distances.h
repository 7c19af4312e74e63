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

    // whether bounds are made of bytes, which makes them lower: by 2 % of the squared lengths of both points, more or less
    static bool by_bytes();

    // squared distance between two cells
    float distance(int32_t i, int32_t j) const;

  private:
    friend class anchor_block;

    // a point in bytes, for quick products
    struct rounding {
        float   scale;  // of a byte
        int32_t sum;    // of the bytes
        float   size;   // length of what the bytes say
        float   lost;   // length of what they do not say, or a little more
    };

    int32_t               n = 0;
    int32_t               d = 0;
    std::vector<float>    data;     // [n][d]
    std::vector<float>    norms;    // squared, [n]
    std::vector<int8_t>   bytes;    // [n][d]; empty where the processor multiplies floats as fast
    std::vector<rounding> rounded;  // [n], as bytes

    const float * row(int32_t i) const { return data.data() + (size_t) i * d; }

    void put(const std::vector<int32_t> & cells, const std::vector<float> & x, int32_t d_x, int32_t first);
    void round(int32_t i);
};

// up to N_ANCHORS anchors side by side
class anchor_block {
  public:
    void set(const kv_points & points, const int32_t * anchors, int32_t n);

    // bounds below the squared distances of up to N_CELLS cells; any[q]: one of cell q is below than[q]
    void bound(const kv_points & points, const int32_t * cells, int32_t n_cells, const float * than, float (*dst)[N_ANCHORS],
               bool * any) const;

  private:
    float                norms[N_ANCHORS];  // squared
    std::vector<float>   data;              // [d][N_ANCHORS]
    std::vector<uint8_t> bytes;             // [d / 4][N_ANCHORS][4], 128 more
    kv_points::rounding  rounded[N_ANCHORS];

    void set_bytes(const kv_points & points, const int32_t * anchors, int32_t n);
    void bound_bytes(const kv_points & points, const int32_t * cells, int32_t n_cells, float (*dst)[N_ANCHORS]) const;
    void bound_floats(const kv_points & points, const int32_t * cells, int32_t n_cells, float (*dst)[N_ANCHORS]) const;
};

}  // namespace elastic
