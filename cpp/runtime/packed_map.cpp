#include "runtime/packed_map.h"

#include <algorithm>
#include <cstring>

namespace elastic {

namespace {

bool same_bits(float a, float b) {
    return std::memcmp(&a, &b, sizeof(a)) == 0;
}

bool all_alike(const std::vector<float> & v) {
    return std::all_of(v.begin(), v.end(), [&](float x) { return same_bits(x, v.front()); });
}

// fn(index in the map, whether the cell is masked in that layer)
template <typename F> void each(const head_map & m, const std::vector<bool> & masked, F fn) {
    for (int32_t il = 0; il < m.n_layer; ++il) {
        for (int32_t ih = 0; ih < m.n_head_kv; ++ih) {
            for (int32_t i = 0; i < m.n_cells; ++i) {
                const size_t at = ((size_t) il * m.n_head_kv + ih) * m.n_cells + i;
                fn(at, !masked.empty() && masked[(size_t) il * m.n_cells + i]);
            }
        }
    }
}

}  // namespace

packed_map::packed_map(const head_map & m, const std::vector<bool> & masked) : values(m) {
    std::vector<float> seen;
    std::vector<float> hidden;
    if (!m.data.empty()) {
        each(m, masked, [&](size_t at, bool is_masked) { (is_masked ? hidden : seen).push_back(m.data[at]); });
    }
    if (seen.empty() || !all_alike(hidden)) {
        return;
    }
    masked_value = hidden.empty() ? 0.0f : hidden.front();
    value        = seen.front();
    kept         = all_alike(seen) ? form::uniform : form::seen;
    values.data  = kept == form::uniform ? std::vector<float>() : std::vector<float>(seen);  // as long as needed
}

head_map packed_map::unpack(const std::vector<bool> & masked) const {
    if (kept == form::whole) {
        return values;
    }
    head_map res(values.n_layer, values.n_head_kv, values.n_cells);
    size_t   next = 0;
    each(res, masked, [&](size_t at, bool is_masked) {
        res.data[at] = is_masked ? masked_value : kept == form::uniform ? value : values.data[next++];
    });
    return res;
}

}  // namespace elastic
