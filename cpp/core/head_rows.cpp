#include "core/head_rows.h"

namespace elastic {

void head_rows::load(const row_source & rows, int32_t il, int32_t ih, int32_t n_cells) {
    d_k = rows.n_embd_head_k();
    d_v = rows.n_embd_head_v();
    k.resize((size_t) n_cells * d_k);
    v.resize((size_t) n_cells * d_v);
    rows.load_k(il, ih, k.data());
    rows.load_v(il, ih, v.data());
}

}  // namespace elastic
