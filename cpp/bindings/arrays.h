#pragma once

// Plain data of the core as NumPy arrays; all of them are copies.

#include "core/plan.h"

#include <pybind11/numpy.h>

#include <algorithm>

namespace elastic {

using f32_array = pybind11::array_t<float, pybind11::array::c_style | pybind11::array::forcecast>;
using u8_array  = pybind11::array_t<uint8_t, pybind11::array::c_style | pybind11::array::forcecast>;

template <typename T> pybind11::array_t<T> to_array(const std::vector<T> & v) {
    pybind11::array_t<T> res((pybind11::ssize_t) v.size());
    std::copy(v.begin(), v.end(), res.mutable_data());
    return res;
}

// [n_layer, n_head_kv, n_cells]
inline pybind11::array_t<float> to_array(const head_map & m) {
    return to_array(m.data).reshape({ m.n_layer, m.n_head_kv, m.n_cells });
}

// kept [n_layer, n_head_kv, n_keep], bucket [n_layer, n_head_kv, n_cells]
inline pybind11::dict to_dict(const plan & p) {
    pybind11::dict res;
    res["kept"]   = to_array(p.kept).reshape({ p.n_layer, p.n_head_kv, p.n_keep });
    res["bucket"] = to_array(p.bucket).reshape({ p.n_layer, p.n_head_kv, p.n_cells });
    return res;
}

inline head_map make_map(const f32_array & a, const char * what) {
    if (a.ndim() != 3) {
        throw error(std::string("[") + what + "] got " + std::to_string(a.ndim()) + " dimensions, expected [n_layer, n_head_kv, n_cells]");
    }
    head_map m((int32_t) a.shape(0), (int32_t) a.shape(1), (int32_t) a.shape(2));
    std::copy(a.data(), a.data() + a.size(), m.data.begin());
    return m;
}

}  // namespace elastic
