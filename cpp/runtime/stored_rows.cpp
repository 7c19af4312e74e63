#include "runtime/stored_rows.h"

#include "kernels/kv_rows.h"

#include <algorithm>

namespace elastic {

namespace {

std::vector<uint8_t> read_bytes(const kv_rows & t, const std::vector<int32_t> & rows) {
    const size_t         n = rows.size() * head_bytes(t);
    std::vector<uint8_t> res(n * t.n_head_kv);
    for (int32_t ih = 0; ih < t.n_head_kv; ++ih) {
        read_raw(t, rows, ih, res.data() + ih * n);
    }
    return res;
}

void write_bytes(const kv_rows & t, const std::vector<int32_t> & rows, const std::vector<uint8_t> & bytes) {
    const size_t n = rows.size() * head_bytes(t);
    for (int32_t ih = 0; ih < t.n_head_kv; ++ih) {
        write_raw(t, rows, ih, bytes.data() + ih * n);
    }
}

// those at `index` of n_rows rows
std::vector<uint8_t> pick_bytes(const std::vector<uint8_t> & bytes, int32_t n_head_kv, size_t n_rows, const std::vector<size_t> & index) {
    std::vector<uint8_t> res;
    if (index.empty()) {
        return res;
    }
    const size_t n = bytes.size() / (n_head_kv * n_rows);
    res.reserve(n * n_head_kv * index.size());
    for (int32_t ih = 0; ih < n_head_kv; ++ih) {
        for (const size_t i : index) {
            const auto first = bytes.begin() + (ih * n_rows + i) * n;
            res.insert(res.end(), first, first + n);
        }
    }
    return res;
}

}  // namespace

layer_bytes read_layer_bytes(const kv_layer & loaded, const std::vector<int32_t> & rows) {
    return { read_bytes(loaded.k, rows), read_bytes(loaded.v, rows) };
}

layer_bytes read_layer_bytes(const kv_view & kv, uint32_t strm, int32_t il, const std::vector<int32_t> & rows) {
    kv_layer layer = layer_of(kv, il, strm);
    layer.load(kv.n_used(strm));
    return read_layer_bytes(layer, rows);
}

void write_layer_bytes(const kv_view & kv, uint32_t strm, int32_t il, const std::vector<int32_t> & rows, const layer_bytes & bytes) {
    kv_layer layer = layer_of(kv, il, strm);
    layer.load(kv.n_used(strm));
    write_bytes(layer.k, rows, bytes.k);
    write_bytes(layer.v, rows, bytes.v);
    layer.store(kv.n_used(strm));
}

bool are_of(const layer_bytes & bytes, const kv_view & kv, int32_t il, size_t n_rows) {
    const kv_layer layer = layer_of(kv, il, 0);
    const size_t   n     = n_rows * layer.k.n_head_kv;
    return bytes.k.size() == n * head_bytes(layer.k) && bytes.v.size() == n * head_bytes(layer.v);
}

layer_bytes stored_rows::pick(int32_t il, const std::vector<int32_t> & rows) const {
    const auto &        own = layers[il].rows;
    std::vector<size_t> index;
    for (const int32_t row : rows) {
        index.push_back(std::lower_bound(own.begin(), own.end(), row) - own.begin());
    }
    const auto & bytes = layers[il].bytes;
    return { pick_bytes(bytes.k, n_head_kv, own.size(), index), pick_bytes(bytes.v, n_head_kv, own.size(), index) };
}

int64_t stored_rows::n_bytes() const {
    int64_t res = 0;
    for (const auto & l : layers) {
        res += (int64_t) (l.rows.size() * sizeof(int32_t) + l.bytes.k.size() + l.bytes.v.size());
    }
    return res;
}

}  // namespace elastic
