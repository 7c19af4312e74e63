#pragma once

// A sequence as it was at one position, so that what came later can be taken back exactly. Its K and V are copied only when
// a row of them is about to change.

#include "runtime/cell_store.h"
#include "runtime/sequence_state.h"

#include "llama-kv-cells.h"

#include <vector>

class llama_io_read_i;
class llama_io_write_i;

namespace elastic {

struct checkpoint {
    llama_pos      pos_end = 0;  // position of the next token: a cut here restores the sequence
    sequence_state state;

    // cells in logical order [n_cells]: where they lay in their stream, and what was known of them
    std::vector<int32_t>           rows;
    std::vector<llama_pos>         pos;
    std::vector<llama_kv_cell_ext> ext;
    std::vector<cell_kind>         kinds;
    cell_scores                    scores;

    std::vector<float> logits;  // after the last token [n_vocab], empty where they are not known

    // rows of K and V as they were stored, of the cells that a layer holds [n_layer][bytes]; empty while they lie in the cache
    std::vector<std::vector<uint8_t>> k;
    std::vector<std::vector<uint8_t>> v;

    bool    is_stored() const { return !k.empty(); }
    int64_t n_bytes() const;  // of everything above

    void              write(llama_io_write_i & io) const;
    static checkpoint read(llama_io_read_i & io, const kv_shape & shape);  // throws std::runtime_error
};

}  // namespace elastic
