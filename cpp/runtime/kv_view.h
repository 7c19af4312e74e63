#pragma once

// The one llama_kv_cache that an elastic cache works on: its cells, and K and V of them. No other file of the runtime includes
// llama-kv-cache.h, but memory_parts.cpp, which finds it, and attention_graph.cpp, which is given a view of it.

#include "core/policy.h"
#include "core/types.h"
#include "kernels/kv_rows.h"
#include "runtime/memory_parts.h"

#include "llama.h"

#include <algorithm>
#include <vector>

class llama_kv_cache;
struct llama_context;
struct llama_elastic_i;
struct llama_memory_context_i;
struct llama_ubatch;

namespace elastic {

// the part of the cache's geometry that is the same for all layers
struct kv_shape {
    std::vector<int32_t> layer_ids;  // model layer of each cache layer, those without KV heads left out
    std::vector<int32_t> owners;     // [layers of the model]: cache layer whose K and V it attends to, -1: none
    std::vector<int32_t> n_users;    // model layers that attend to each cache layer
    int32_t              n_layer_model = 0;
    int32_t              n_layer       = 0;
    int32_t              n_head        = 0;
    int32_t              n_head_kv     = 0;
    int32_t              n_embd_head_k = 0;
    int32_t              n_embd_head_v = 0;
    int32_t              kv_size       = 0;  // cells per stream
    int32_t              n_stream      = 0;
    int64_t              cell_bytes    = 0;  // K and V of one cell, all layers

    int32_t n_heads() const { return n_layer * n_head_kv; }

    // cache layer whose K and V a model layer attends to, -1 if there is none
    int32_t index_of(int32_t il_model) const { return owners[il_model]; }
};

// what llama.cpp knows of a cell: its position, its token, and under M-RoPE where in its image it lies
struct cell_place {
    llama_pos   pos   = 0;
    llama_pos   x     = 0;
    llama_pos   y     = 0;
    llama_token token = LLAMA_TOKEN_NULL;

    bool      operator==(const cell_place & o) const { return pos == o.pos && x == o.x && y == o.y; }
    // a position that no token up to this one of its sequence takes: behind an image its height and width count
    llama_pos next() const { return std::max({ pos, x, y }) + 1; }
};

// the cells of one ubatch
struct placed_cells {
    int32_t n_stream    = 0;
    int32_t n_of_stream = 0;  // tokens per stream

    std::vector<uint32_t>             strm;  // [n_stream]
    std::vector<std::vector<int32_t>> rows;  // [n_stream][n_of_stream]
};

// K and V of one layer in host memory. Device buffers are copied in by load() and back by store().
class kv_layer {
  public:
    kv_layer(ggml_tensor * t_k, ggml_tensor * t_v, const kv_shape & shape, uint32_t strm);

    void load(int32_t n_rows);   // the first ones
    void store(int32_t n_rows);  // of those loaded

    // row `from`, head by head, to the rows of `to`; from and to a device no more than that
    void move_heads(int32_t from, const std::vector<int32_t> & to);

    kv_rows k;
    kv_rows v;

  private:
    ggml_tensor *        t_k;
    ggml_tensor *        t_v;
    uint32_t             strm;
    std::vector<uint8_t> buf_k;
    std::vector<uint8_t> buf_v;
};

// keys and values of the given cells for the plan
class kv_source : public row_source {
  public:
    kv_source(const std::vector<kv_layer> & layers, const std::vector<int32_t> & rows) : layers(layers), rows(rows) {}

    int32_t n_embd_head_k() const override { return layers.front().k.n_embd_head; }
    int32_t n_embd_head_v() const override { return layers.front().v.n_embd_head; }
    void    load_k(int32_t il, int32_t ih, float * dst) const override;
    void    load_v(int32_t il, int32_t ih, float * dst) const override;

  private:
    const std::vector<kv_layer> & layers;
    const std::vector<int32_t> &  rows;
};

class kv_view {
  public:
    explicit kv_view(llama_context & ctx);  // throws unsupported

    const memory_parts parts;
    const kv_shape     shape;

    // llama.cpp's cache calls it from now on; nullptr: nobody
    void set_policy(llama_elastic_i * policy);

    // shifts and copies of streams that wait are carried out, and what was computed is there
    void settle() const;
    void synchronize() const;

    static void log_error(const std::string & text);  // through llama.cpp

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

    static placed_cells placed(const llama_memory_context_i & mctx);

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

    ggml_tensor *         k(int32_t il) const;  // by cache layer
    ggml_tensor *         v(int32_t il) const;
    kv_layer              layer(int32_t il, uint32_t strm) const { return { k(il), v(il), shape, strm }; }
    std::vector<kv_layer> layers(uint32_t strm) const;  // the rows in use, loaded
    bool                  on_host() const;              // all of K and V

  private:
    llama_context &  ctx;
    llama_kv_cache & kv;
};

}  // namespace elastic
