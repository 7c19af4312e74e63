#pragma once

// The one llama_kv_cache that an elastic cache works on: its cells, and K and V of them. Beside it only those include llama-kv-cache.h that
// find it (memory_parts), pass on what is removed (watched_memory), keep a window's cells (window_backup) or are given a view of it
// (attention_graph, attention_ops).

#include "runtime/kv_shape.h"
#include "runtime/memory_parts.h"

#include "llama.h"

#include <string>
#include <vector>

class llama_kv_cache;
struct llama_context;
struct llama_memory_context_i;
struct llama_ubatch;

namespace elastic {

class kv_view {
  public:
    explicit kv_view(llama_context & ctx);  // throws unsupported

    const memory_parts parts;
    const kv_shape     shape;

    // shifts and copies of streams that wait are carried out, and what was computed is there
    void settle() const;
    void synchronize() const;

    //
    // cells. A row is the place of a cell in its stream; the logical order of a sequence's cells is that of arrival: of position, and
    // inside an image, whose cells may share one, that of the mask
    //

    int32_t   n_seq_max() const;
    uint32_t  stream(llama_seq_id seq_id) const;
    int32_t   n_used(uint32_t strm) const;  // rows up to the last one in use
    int32_t   n_free(llama_seq_id seq_id) const;
    bool      is_free(uint32_t strm, int32_t row) const;
    bool      is_shared(uint32_t strm, int32_t row) const;  // by several sequences
    bool      has(uint32_t strm, int32_t row, llama_seq_id seq_id) const;
    llama_pos pos(uint32_t strm, int32_t row) const;
    bool      empty() const;

    int32_t              n_cells(llama_seq_id seq_id) const;
    int32_t              n_cells(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;  // at positions [p0, p1)
    llama_pos            pos_max(llama_seq_id seq_id) const;                              // -1: it is empty
    llama_pos            pos_next(llama_seq_id seq_id) const;                             // of the next token; 0: it is empty
    std::vector<int32_t> rows(llama_seq_id seq_id) const;                                 // in logical order
    std::vector<int32_t> own_rows(llama_seq_id seq_id) const;                             // that no other sequence uses

    cell_place place(uint32_t strm, int32_t row) const;

    //
    // changes
    //

    // nobody uses the row any more
    void free_row(uint32_t strm, int32_t row);
    // the sequence does not use the row any more; whether it is free then
    bool remove(uint32_t strm, int32_t row, llama_seq_id seq_id);
    void put(uint32_t strm, int32_t row, const cell_place & place, llama_seq_id seq_id);  // into a free row
    void search_from(uint32_t strm, int32_t row);                                         // free cells, the next time
    // as llama_memory_seq_rm to the end, of all parts of the memory
    void cut(llama_seq_id seq_id, llama_pos p0);

    //
    // K and V
    //

    ggml_tensor * k(int32_t il) const;  // by cache layer
    ggml_tensor * v(int32_t il) const;

  private:
    llama_context &  ctx;
    llama_kv_cache & kv;
};

// the cells of an ubatch
placed_cells placed_in(const llama_memory_context_i & mctx);

void log_error(const std::string & text);  // through llama.cpp

}  // namespace elastic
