// A checkpoint as bytes: its size, and its form in a saved state.

#include "runtime/checkpoint.h"

#include "llama-io.h"

#include <stdexcept>

namespace elastic {

namespace {

template <typename T> int64_t bytes_of(const std::vector<T> & v) {
    return (int64_t) (v.size() * sizeof(T));
}

template <typename T> void write_vector(llama_io_write_i & io, const std::vector<T> & v) {
    const uint64_t n = v.size();
    io.write(&n, sizeof(n));
    io.write(v.data(), n * sizeof(T));
}

template <typename T> void read_vector(llama_io_read_i & io, std::vector<T> & v, uint64_t n_max) {
    uint64_t n = 0;
    io.read(&n, sizeof(n));
    if (n > n_max) {
        throw std::runtime_error("elastic state: a checkpoint is larger than the context");
    }
    v.resize(n);
    io.read(v.data(), n * sizeof(T));
}

// all maps, in the order in which they are written
std::vector<head_map *> maps_of(checkpoint & ck) {
    std::vector<head_map *> res = { &ck.scores.sum, &ck.counts, &ck.bias, &ck.scores.decayed, &ck.scores.windowed };
    for (auto & m : ck.scores.queries) {
        res.push_back(&m);
    }
    return res;
}

}  // namespace

int64_t checkpoint::n_bytes() const {
    int64_t res = bytes_of(rows) + bytes_of(places) + bytes_of(kinds) + bytes_of(rank_scores) + bytes_of(logits);
    for (const auto * m : maps_of(const_cast<checkpoint &>(*this))) {
        res += bytes_of(m->data);
    }
    for (const auto * side : { &k, &v }) {
        for (const auto & bytes : *side) {
            res += bytes_of(bytes);
        }
    }
    return res;
}

void checkpoint::write(llama_io_write_i & io) const {
    io.write(&pos_end, sizeof(pos_end));
    const int64_t numbers[] = { state.n_tokens,    state.pos_prompt,     state.pos_turn, state.pos_moved,
                                state.pos_changed, state.n_prompt_cells, state.pending,  state.n_unscored };
    io.write(numbers, sizeof(numbers));

    write_vector(io, rows);
    write_vector(io, places);
    write_vector(io, kinds);
    const uint64_t n_queries = scores.queries.size();
    io.write(&n_queries, sizeof(n_queries));
    for (const auto * m : maps_of(const_cast<checkpoint &>(*this))) {
        write_vector(io, m->data);
    }
    write_vector(io, rank_scores);
    write_vector(io, logits);
    for (size_t il = 0; il < k.size(); ++il) {
        write_vector(io, k[il]);
        write_vector(io, v[il]);
    }
}

checkpoint checkpoint::read(llama_io_read_i & io, const kv_shape & shape) {
    const uint64_t n_max = (uint64_t) shape.kv_size;

    checkpoint res;
    io.read(&res.pos_end, sizeof(res.pos_end));
    int64_t numbers[8];
    io.read(numbers, sizeof(numbers));
    res.state = { numbers[0],
                  0,
                  (llama_pos) numbers[1],
                  (llama_pos) numbers[2],
                  (llama_pos) numbers[3],
                  (llama_pos) numbers[4],
                  (int32_t) numbers[5],
                  numbers[6] != 0,
                  (int32_t) numbers[7] };

    read_vector(io, res.rows, n_max);
    const uint64_t n = res.rows.size();
    read_vector(io, res.places, n);
    read_vector(io, res.kinds, n);
    uint64_t n_queries = 0;
    io.read(&n_queries, sizeof(n_queries));
    if (n_queries > (uint64_t) recorded_statistics().n_window || n == 0 || res.places.size() != n || res.kinds.size() != n) {
        throw std::runtime_error("elastic state: a checkpoint is damaged");
    }
    res.scores.queries.resize(n_queries);
    for (auto * m : maps_of(res)) {
        read_vector(io, m->data, (uint64_t) shape.n_layer * shape.n_head_kv * n);
        if (!m->data.empty()) {
            m->n_layer   = shape.n_layer;
            m->n_head_kv = shape.n_head_kv;
            m->n_cells   = (int32_t) n;
        }
    }
    read_vector(io, res.rank_scores, n);
    read_vector(io, res.logits, UINT32_MAX);
    for (int32_t il = 0; il < shape.n_layer; ++il) {
        read_vector(io, res.k.emplace_back(), n * (uint64_t) shape.cell_bytes);
        read_vector(io, res.v.emplace_back(), n * (uint64_t) shape.cell_bytes);
    }
    return res;
}

}  // namespace elastic
