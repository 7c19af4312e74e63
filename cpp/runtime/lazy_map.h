#pragma once

// A float per layer, KV head and cell of one stream, 0 until it is written. What was never written takes no memory,
// so a long context costs nothing before it is used.

#include "core/types.h"
#include "runtime/pages.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace elastic {

class lazy_map {
  public:
    lazy_map() = default;

    lazy_map(int32_t n_rows, int32_t n_cells) : n_rows(n_rows), n_cells(n_cells), data((float *) std::malloc(n_bytes())) {
        if (!data) {
            throw std::bad_alloc();
        }
        clear();
    }

    void clear() { release_bytes(data.get(), n_bytes()); }

    // the first n cells of every row
    void copy_from(const lazy_map & other, int32_t n) {
        for (int32_t r = 0; r < n_rows; ++r) {
            std::memcpy(row(r), other.row(r), n * sizeof(float));
        }
    }

    // m has one row per row of the map, and a column for each of these cells
    void gather(const std::vector<int32_t> & cells, head_map & m) const {
        for (int32_t r = 0; r < n_rows; ++r) {
            const float * src = row(r);
            std::transform(cells.begin(), cells.end(), m.data.begin() + (size_t) r * cells.size(), [&](int32_t cell) { return src[cell]; });
        }
    }
    void scatter(const std::vector<int32_t> & cells, const head_map & m) {
        for (int32_t r = 0; r < n_rows; ++r) {
            const float * src = m.data.data() + (size_t) r * cells.size();
            float *       dst = row(r);
            for (size_t i = 0; i < cells.size(); ++i) {
                dst[cells[i]] = src[i];
            }
        }
    }

    float *       row(int32_t r) { return data.get() + (size_t) r * n_cells; }
    const float * row(int32_t r) const { return data.get() + (size_t) r * n_cells; }

  private:
    size_t n_bytes() const { return (size_t) n_rows * n_cells * sizeof(float); }

    struct deleter {
        void operator()(float * p) const { std::free(p); }
    };

    int32_t                         n_rows  = 0;
    int32_t                         n_cells = 0;
    std::unique_ptr<float, deleter> data;
};

}  // namespace elastic
