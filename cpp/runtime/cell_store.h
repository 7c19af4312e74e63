#pragma once

// What the runtime remembers of every cell, beside K and V: importance, tokens merged in, attention bias, kind.

#include "core/merge.h"
#include "runtime/kv_access.h"

#include "ggml-cpp.h"

#include <vector>

namespace elastic {

class cell_store {
  public:
    // maps that the policy does not need are not allocated
    cell_store(const llama_kv_cache & kv, const kv_shape & shape, const policy & pol);

    // an ordinary, new cell
    void reset_cell(uint32_t strm, int32_t cell, cell_kind kind);
    void reset();

    void copy_stream(uint32_t strm_src, uint32_t strm_dst);

    // state of the given cells in logical order, and back
    cell_state gather(uint32_t strm, const std::vector<int32_t> & rows) const;
    void       scatter(uint32_t strm, const std::vector<int32_t> & rows, const cell_state & state);

    cell_kind kind(uint32_t strm, int32_t cell) const { return kinds[strm][cell]; }
    void      set_kind(uint32_t strm, int32_t cell, cell_kind kind) { kinds[strm][cell] = kind; }

    // importance summed over layers and heads
    float total(uint32_t strm, int32_t cell) const { return totals[strm][cell]; }
    void  update_totals(uint32_t strm, const std::vector<int32_t> & rows);

    // mass of one layer and head, [kv_size]; nullptr when the policy needs none
    float * mass_row(uint32_t strm, int32_t il, int32_t ih);

    bool          has_mass() const { return !mass.empty(); }
    bool          has_count() const { return !count.empty(); }
    bool          has_bias_map() const { return !bias.empty(); }
    bool          any_bias() const { return n_biased > 0; }
    ggml_tensor * bias_tensor(int32_t il_model) const;

    int64_t bias_bytes_per_cell() const;

  private:
    const kv_shape shape;

    // [n_stream] of maps over all cells of the stream
    std::vector<head_map> mass;
    std::vector<head_map> count;
    std::vector<head_map> bias;

    std::vector<std::vector<cell_kind>> kinds;   // [n_stream][kv_size]
    std::vector<std::vector<float>>     totals;  // [n_stream][kv_size]
    std::vector<std::vector<uint8_t>>   biased;  // [n_stream][kv_size]
    int64_t                             n_biased = 0;

    // the bias where the graphs read it, one tensor per layer: F32 [kv_size, n_head_kv, n_stream]
    std::vector<ggml_context_ptr>        ctxs;
    std::vector<ggml_backend_buffer_ptr> bufs;
    std::vector<ggml_tensor *>           bias_tensors;

    void upload_bias(uint32_t strm, int32_t cell_min, int32_t cell_max);
    void set_biased(uint32_t strm, int32_t cell, bool value);
};

}  // namespace elastic
