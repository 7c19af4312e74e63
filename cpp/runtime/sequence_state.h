#pragma once

// What the runtime knows of one sequence beside its cells.

#include "llama.h"

namespace elastic {

struct sequence_state {
    int64_t   n_tokens       = 0;      // decoded since the sequence was last empty
    llama_pos pos_prompt     = -1;     // last position that came in as a prompt
    llama_pos pos_turn       = 0;      // where the last prompt began
    llama_pos pos_moved      = -1;     // last position before which rows were merged, evicted or moved
    llama_pos pos_changed    = -1;     // last position that changed more than it added: moved rows, scores, the stage
    int32_t   n_prompt_cells = 0;      // held right after the last prompt (P)
    bool      pending        = false;  // prompt tokens wait to be compressed
    int32_t   n_unscored     = 0;      // generated tokens since the attention was last added to the scores
};

}  // namespace elastic
