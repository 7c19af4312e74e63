#pragma once

// The bias of cells in the attention logits, where the graphs read it, and the cells that are masked in single layers, by a
// bias of -infinity.

#include "core/merge.h"
#include "runtime/kv_view.h"
#include "runtime/lazy_map.h"

#include "ggml-cpp.h"

#include <vector>

namespace elastic {

class layer_bias {
  public:
    // wanted: the policy gives cells a bias; otherwise there is none, and no cell is masked
    layer_bias(const kv_view & kv, bool wanted);

    bool          is_kept() const { return !maps.empty(); }
    bool          any() const { return n_biased > 0; }  // some cell has one
    bool          any_masked() const { return n_masked > 0; }
    ggml_tensor * tensor(int32_t il) const { return tensors[il]; }  // f32 [kv_size, n_head_kv, n_stream], as of the last upload
    int64_t       bytes_per_cell() const;

    // before a graph reads the tensors: what has changed since the last time, so that many cells are one transfer
    void upload();

    void reset();
    void reset_cell(uint32_t strm, int32_t cell);
    void copy_stream(uint32_t strm_src, uint32_t strm_dst, int32_t n);  // the first n cells
    void move_head(uint32_t strm, int32_t src, int32_t dst, int32_t il, int32_t ih);

    // of cells in logical order
    head_map gather(uint32_t strm, const std::vector<int32_t> & rows) const;
    void     scatter(uint32_t strm, const std::vector<int32_t> & rows, const head_map & values);

    // whether the cell is masked in the layer
    bool is_masked(uint32_t strm, int32_t cell, int32_t il) const {
        return n_masked > 0 && !masked[strm].empty() && masked[strm][(size_t) il * kv_size + cell];
    }
    void mask(uint32_t strm, int32_t cell, int32_t il);

    // cells of `rows` that each layer holds  [n_layer]
    std::vector<int32_t> cells_per_layer(uint32_t strm, const std::vector<int32_t> & rows) const;

  private:
    const int32_t n_layer;
    const int32_t n_head_kv;
    const int32_t kv_size;

    std::vector<lazy_map>             maps;    // [n_stream]
    std::vector<std::vector<uint8_t>> biased;  // [n_stream][kv_size]: some head has one
    std::vector<std::vector<uint8_t>> masked;  // [n_stream][n_layer][kv_size], empty while none is
    int64_t                           n_biased = 0;
    int64_t                           n_masked = 0;

    struct range {  // of cells; empty where hi is 0
        int32_t lo = 0;
        int32_t hi = 0;

        void add(int32_t first, int32_t last);
    };
    std::vector<range> changed;  // [n_stream], not uploaded yet

    std::vector<ggml_context_ptr>        ctxs;
    std::vector<ggml_backend_buffer_ptr> bufs;
    std::vector<ggml_tensor *>           tensors;  // [n_layer]

    int32_t index(int32_t il, int32_t ih) const { return il * n_head_kv + ih; }
    void    make_tensors(const kv_view & kv);
    void    set_biased(uint32_t strm, int32_t cell, bool value);
    void    set_masked(uint32_t strm, int32_t cell, int32_t il, bool value);
    void    set(uint32_t strm, int32_t cell, int32_t il, int32_t ih, float value);
    void    upload(uint32_t strm, const range & cells);
};

}  // namespace elastic
