// What a checkpoint knows of its cells, and which of them a layer holds.

#include "runtime/checkpoint.h"

#include <algorithm>
#include <iterator>

namespace elastic {

// which cells are masked in which layers  [n_layer][n_cells]; empty where none is
static std::vector<bool> masked_in(const head_map & bias) {
    std::vector<bool> res;
    for (int32_t il = 0; il < bias.n_layer && !bias.data.empty(); ++il) {
        std::transform(bias.row(il, 0), bias.row(il, 0) + bias.n_cells, std::back_inserter(res), [](float x) { return x == masked_bias; });
    }
    return std::find(res.begin(), res.end(), true) == res.end() ? std::vector<bool>() : res;
}

std::vector<int32_t> checkpoint::of_layer(int32_t il, const std::vector<int32_t> & cells) const {
    std::vector<int32_t> res;
    for (size_t i = 0; i < cells.size(); ++i) {
        if (holds(il, i)) {
            res.push_back(cells[i]);
        }
    }
    return res;
}

layer_bytes checkpoint::bytes_of_layer(int32_t il, const kv_view & kv, uint32_t strm) const {
    return is_stored() ? stored->pick(il, of_layer(il, stored_at)) : read_layer_bytes(kv, strm, il, rows_of_layer(il));
}

void checkpoint::pack(checkpoint_maps & of_cells) {
    masked = masked_in(of_cells.bias);
    maps.clear();
    for (const head_map * m : of_cells.all()) {
        maps.emplace_back(*m, masked);
    }
}

checkpoint_maps checkpoint::unpack() const {
    checkpoint_maps res;
    const auto      all = res.all();
    for (size_t i = 0; i < all.size(); ++i) {
        *all[i] = maps[i].unpack(masked);
    }
    return res;
}

std::vector<head_map *> checkpoint_maps::all() {
    return { &scores.sum, &counts, &bias, &scores.decayed };
}

}  // namespace elastic
