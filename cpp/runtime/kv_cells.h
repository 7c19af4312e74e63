#pragma once

// One cell of llama.cpp's, read and written with all that is known of its place.

#include "runtime/kv_shape.h"

#include "llama-kv-cells.h"

namespace elastic {

inline cell_place place_of(const llama_kv_cells & cells, uint32_t row) {
    const auto & ext = cells.ext_get(row);
    return { cells.pos_get(row), ext.x, ext.y, ext.tok };
}

// the row is free
inline void put_cell(llama_kv_cells & cells, uint32_t row, const cell_place & place, llama_seq_id seq_id) {
    llama_kv_cell_ext ext;
    ext.x   = place.x;
    ext.y   = place.y;
    ext.tok = place.token;
    cells.pos_set(row, place.pos);
    cells.ext_set(row, ext);
    cells.seq_add(row, seq_id);
}

}  // namespace elastic
