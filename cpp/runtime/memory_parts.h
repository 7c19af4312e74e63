#pragma once

// The memory of a context as llama.cpp made it: the attention cache that an elastic cache works on, and what lies beside it and is left
// alone. Beside kv_view.cpp the only file that knows llama.cpp's kinds of memory.

#include "runtime/elastic.h"

#include "llama.h"

#include <stdexcept>

class llama_kv_cache;
class llama_kv_cache_context;
class llama_memory_recurrent;
struct llama_context;
struct llama_hparams;
struct llama_memory_context_i;

namespace elastic {

// thrown when the model's memory cannot be compressed
struct unsupported : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// of the cells, or the state, that a sequence holds now; cells that a window has passed count until they are used again
struct bytes_in_use {
    int64_t attention = 0;  // K and V, no bias
    int64_t other     = 0;
};

struct memory_parts {
    llama_kv_cache *         attention = nullptr;  // of the layers that attend to everything
    llama_kv_cache *         window    = nullptr;  // of those with a sliding window
    llama_memory_recurrent * recurrent = nullptr;

    explicit memory_parts(llama_context & ctx);  // throws unsupported

    // the cells of an ubatch in the attention cache
    static const llama_kv_cache_context & attention_of(const llama_memory_context_i & mctx);

    // Whether everything from p0 on can be removed of the other parts, and what follows is as if it had never been there.
    // A window has to hold what a token at p0 looks at; a recurrent state holds one position.
    bool can_cut(llama_seq_id seq_id, llama_pos p0) const;

    // whether a token at pos_to looks at one at pos_from in the window part
    bool in_window(llama_pos pos_from, llama_pos pos_to) const;

    // cells in which a token of the sequence can be placed, the smallest number over the parts
    int32_t n_free(llama_seq_id seq_id) const;
    // cells of the window part that n_ubatch tokens and all they look at take; 0: there is no such part, or it is as large
    int32_t n_window_lacks(int32_t n_ubatch) const;

    int64_t      other_bytes() const;  // allocated by the other parts
    bytes_in_use in_use(llama_seq_id seq_id) const;
    int32_t      n_seq_max() const;
    int32_t      other_cells() const;  // of the window part, or of the recurrent one where there is none
    const char * kind() const;

  private:
    const llama_hparams & hparams;
};

}  // namespace elastic
