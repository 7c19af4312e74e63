#pragma once

// What the runtime remembers of every cell, beside K and V: importance, tokens merged in, attention bias, kind.

#include "core/merge.h"
#include "runtime/config.h"
#include "runtime/kv_access.h"
#include "runtime/lazy_map.h"

#include "ggml-cpp.h"

#include <vector>

namespace elastic {

// everything that a cell_store remembers of some cells, in logical order
struct cell_scores {
    cell_state            state;
    head_map              fading;  // no cells where none is kept, likewise the next two
    head_map              windowed;
    std::vector<head_map> queries;  // newest first
    std::vector<float>    totals;   // [n_cells]
};

class cell_store {
  public:
    // maps that the policy does not need are not allocated
    // bias_scale: what the graphs multiply the logits with after they have added the bias
    cell_store(const llama_kv_cache & kv, const kv_shape & shape, const config & cfg, float bias_scale);

    // an ordinary, new cell
    void reset_cell(uint32_t strm, int32_t cell, cell_kind kind);
    void reset();

    // the first n cells, which is all that are in use
    void copy_stream(uint32_t strm_src, uint32_t strm_dst, int32_t n);

    // state of the given cells in logical order, and back
    cell_state gather(uint32_t strm, const std::vector<int32_t> & rows) const;
    void       scatter(uint32_t strm, const std::vector<int32_t> & rows, const cell_state & state);

    // all of it, and back exactly
    cell_scores gather_scores(uint32_t strm, const std::vector<int32_t> & rows) const;
    void        scatter_scores(uint32_t strm, const std::vector<int32_t> & rows, const cell_scores & scores);

    cell_kind kind(uint32_t strm, int32_t cell) const { return kinds[strm][cell]; }
    void      set_kind(uint32_t strm, int32_t cell, cell_kind kind) { kinds[strm][cell] = kind; }

    // the recent scores of the given cells in logical order, and back; no cells where none is kept
    head_map gather_fading(uint32_t strm, const std::vector<int32_t> & rows) const;
    head_map gather_window(uint32_t strm, const std::vector<int32_t> & rows) const;
    void     scatter_fading(uint32_t strm, const std::vector<int32_t> & rows, const head_map & m);
    void     scatter_window(uint32_t strm, const std::vector<int32_t> & rows, const head_map & m);

    // score summed over layers and heads by which a cell may leave while generating; infinite: it says nothing
    float              total(uint32_t strm, int32_t cell) const { return totals[strm][cell]; }
    void               set_totals(uint32_t strm, const std::vector<int32_t> & rows, const std::vector<float> & values);
    // importance summed over layers and heads
    std::vector<float> sum_mass(uint32_t strm, const std::vector<int32_t> & rows) const;
    // for a prompt that was not compressed: image cells may leave by their importance
    void               rate_image_cells(uint32_t strm, const std::vector<int32_t> & rows);

    // mass of one layer and head, [kv_size]; nullptr when the policy needs none
    float * mass_row(uint32_t strm, int32_t il, int32_t ih);
    // the decaying score, likewise
    float * fading_row(uint32_t strm, int32_t il, int32_t ih);

    // Scores of the last queries one by one, for a window of whole queries: begin_query() makes room for
    // one more, query_row() is where its attention goes, `ago` queries back. Queries of all sequences of a
    // stream count.
    void    begin_query(uint32_t strm);
    float * query_row(uint32_t strm, int32_t ago, int32_t il, int32_t ih);

    // one value of the bias, in the tensor too
    float bias_at(uint32_t strm, int32_t cell, int32_t il, int32_t ih) const { return bias[strm].row(index(il, ih))[cell]; }
    void  set_bias(uint32_t strm, int32_t cell, int32_t il, int32_t ih, float value);

    // whether a layer does without the cell, and whether any did without one since the last reset
    bool is_absent(uint32_t strm, int32_t cell, int32_t il) const {
        return some_absent && biased[strm][cell] && bias_at(strm, cell, il, 0) == absent_bias;
    }
    bool any_absent() const { return some_absent; }
    // a layer does without the cell from now on
    void make_absent(uint32_t strm, int32_t cell, int32_t il);

    // what head (il, ih) holds in `src` is now what it holds in `dst`
    void move_head(uint32_t strm, int32_t src, int32_t dst, int32_t il, int32_t ih);

    bool          has_scores() const { return has_mass() || has_fading() || has_window(); }
    bool          has_fading() const { return !fading.empty(); }
    bool          has_window() const { return !windowed.empty(); }
    bool          has_mass() const { return !mass.empty(); }
    bool          has_count() const { return !extra.empty(); }
    bool          has_bias_map() const { return !bias.empty(); }
    bool          any_bias() const { return n_biased > 0; }
    ggml_tensor * bias_tensor(int32_t il_model) const;
    float         bias_scale() const { return scale; }

    int64_t bias_bytes_per_cell() const;

  private:
    const kv_shape shape;
    const float    scale;

    // [n_stream] of maps over all cells of the stream. Of the recent scores a policy has one; both are kept
    // while recording
    std::vector<lazy_map> mass;
    std::vector<lazy_map> extra;  // tokens merged in, beside the cell's own
    std::vector<lazy_map> bias;
    std::vector<lazy_map> fading;    // the decaying score
    std::vector<lazy_map> windowed;  // over the last queries; what came with a saved state

    // [n_stream][n_window]: the last queries, in a ring
    std::vector<std::vector<lazy_map>> queries;
    std::vector<int32_t>               last_query;  // [n_stream]
    std::vector<uint8_t>               has_loaded;  // [n_stream]: windowed holds something

    std::vector<std::vector<cell_kind>> kinds;   // [n_stream][kv_size]
    std::vector<std::vector<float>>     totals;  // [n_stream][kv_size]
    std::vector<std::vector<uint8_t>>   biased;  // [n_stream][kv_size]
    int64_t                             n_biased    = 0;
    bool                                some_absent = false;

    // the bias over its scale where the graphs read it, one tensor per layer: F32 [kv_size, n_head_kv, n_stream]
    std::vector<ggml_context_ptr>        ctxs;
    std::vector<ggml_backend_buffer_ptr> bufs;
    std::vector<ggml_tensor *>           bias_tensors;

    int32_t index(int32_t il, int32_t ih) const { return il * shape.n_head_kv + ih; }
    int32_t n_rows() const { return shape.n_layer * shape.n_head_kv; }
    int32_t query_index(uint32_t strm, int32_t ago) const;  // in the ring

    // values plus `shift`
    head_map take(const std::vector<lazy_map> & from, uint32_t strm, const std::vector<int32_t> & rows, float shift = 0.0f) const;
    void put(std::vector<lazy_map> & to, uint32_t strm, const std::vector<int32_t> & rows, const head_map & from, float shift = 0.0f) const;

    void upload_bias(uint32_t strm, int32_t cell_min, int32_t cell_max);
    void set_biased(uint32_t strm, int32_t cell, bool value);
};

}  // namespace elastic
