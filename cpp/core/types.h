#pragma once

// Plain data that flows through the core: importance -> plan -> merge.
// Logical index = order of arrival of a cell in its sequence, [0, n_cells).

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace elastic {

// every exception the library throws on bad input; bindings map it to ElasticError
struct error : std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};

enum class cell_kind : uint8_t {
    text      = 0,  // a token of the prompt
    image     = 1,  // came in as an embedding (token == LLAMA_TOKEN_NULL)
    generated = 2,  // a token decoded after the prompt
};

// what a policy may know of the cells of one sequence, in logical order
struct cells {
    std::vector<cell_kind> kind;    // [n_cells]
    std::vector<uint8_t>   pinned;  // [n_cells], 1: another sequence uses it too, it must stay as it is
    std::vector<uint8_t>   masked;  // [n_layer][n_cells], 1: masked in the layer; empty: none is
    std::vector<uint8_t>   old;     // [n_cells], 1: text of an earlier turn, or an answer's that is not its newest; empty: none
    std::vector<int32_t>   tokens;  // [n_cells], tokens it stands for, more than one after a compression; empty: one each

    int32_t size() const { return (int32_t) kind.size(); }
    bool    is_image(int32_t i) const { return kind[i] == cell_kind::image; }

    bool    is_old(int32_t i) const { return !old.empty() && old[i]; }
    int32_t n_tokens(int32_t i) const { return tokens.empty() ? 1 : tokens[i]; }

    // earlier turns about an image: what is left of them, and it, compete for what the present question leaves
    bool has_past() const;

    bool is_masked(int32_t il, int32_t i) const { return !masked.empty() && masked[(size_t) il * kind.size() + i]; }

    // nothing was said after the last image: what will be asked about it is not known yet
    bool ends_with_image() const { return !kind.empty() && kind.back() == cell_kind::image; }
};

// one float per layer, KV head and cell; higher = keep
struct head_map {
    int32_t            n_layer   = 0;
    int32_t            n_head_kv = 0;
    int32_t            n_cells   = 0;
    std::vector<float> data;  // [n_layer][n_head_kv][n_cells]

    head_map() = default;
    head_map(int32_t n_layer, int32_t n_head_kv, int32_t n_cells, float fill = 0.0f)
        : n_layer(n_layer), n_head_kv(n_head_kv), n_cells(n_cells), data((size_t) n_layer * n_head_kv * n_cells, fill) {}

    float *       row(int32_t il, int32_t ih) { return data.data() + ((size_t) il * n_head_kv + ih) * n_cells; }
    const float * row(int32_t il, int32_t ih) const { return data.data() + ((size_t) il * n_head_kv + ih) * n_cells; }
};

}  // namespace elastic
