// A checkpoint as bytes: its size, and its form in a saved state.

#include "runtime/checkpoint.h"

#include "llama-io.h"

#include <numeric>
#include <stdexcept>

namespace elastic {

namespace {

template <typename T> int64_t bytes_of(const std::vector<T> & v) {
    return (int64_t) (v.size() * sizeof(T));
}

template <typename T> void write_vector(llama_io_write_i & io, const std::vector<T> & v) {
    const uint64_t n = v.size();
    io.write(&n, sizeof(n));
    if (n > 0) {  // an empty vector has no address
        io.write(v.data(), n * sizeof(T));
    }
}

template <typename T> void read_vector(llama_io_read_i & io, std::vector<T> & v, uint64_t n_max) {
    uint64_t n = 0;
    io.read(&n, sizeof(n));
    if (n > n_max) {
        throw std::runtime_error("elastic state: a checkpoint is larger than the context");
    }
    v.resize(n);
    if (n > 0) {
        io.read(v.data(), n * sizeof(T));
    }
}

// no window of queries: a checkpoint is taken where no prompt waits. The form has a place for two numbers of them
constexpr uint64_t no_queries = 0;

void check(bool is_good) {
    if (!is_good) {
        throw std::runtime_error("elastic state: a checkpoint is damaged");
    }
}

void read_no_queries(llama_io_read_i & io) {
    uint64_t n = 0;
    io.read(&n, sizeof(n));
    check(n == no_queries);
}

}  // namespace

int64_t checkpoint::n_bytes() const {
    int64_t res = bytes_of(rows) + bytes_of(places) + bytes_of(kinds) + bytes_of(rank_scores) + bytes_of(logits);
    for (const auto & m : maps) {
        res += m.n_bytes();
    }
    return res + (int64_t) masked.size() / 8;
}

void checkpoint::write(llama_io_write_i & io, const kv_view & kv, uint32_t strm) const {
    io.write(&pos_end, sizeof(pos_end));
    const int64_t numbers[] = { state.n_tokens,    state.pos_prompt,     state.pos_turn, state.pos_moved,
                                state.pos_changed, state.n_prompt_cells, state.pending,  state.n_unscored };
    io.write(numbers, sizeof(numbers));

    write_vector(io, rows);
    write_vector(io, places);
    write_vector(io, kinds);
    checkpoint_maps of_cells = unpack();
    io.write(&no_queries, sizeof(no_queries));
    for (const head_map * m : of_cells.all()) {
        write_vector(io, m->data);
    }
    io.write(&no_queries, sizeof(no_queries));
    write_vector(io, rank_scores);
    write_vector(io, logits);
    for (int32_t il = 0; il < kv.shape.n_layer; ++il) {
        const layer_bytes bytes = bytes_of_layer(il, kv, strm);
        write_vector(io, bytes.k);
        write_vector(io, bytes.v);
    }
}

checkpoint checkpoint::read(llama_io_read_i & io, const kv_view & kv) {
    const kv_shape & shape = kv.shape;
    const uint64_t   n_max = (uint64_t) shape.kv_size;

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
                  true,
                  (int32_t) numbers[7] };

    read_vector(io, res.rows, n_max);
    const uint64_t n = res.rows.size();
    read_vector(io, res.places, n);
    read_vector(io, res.kinds, n);
    read_no_queries(io);
    check(n > 0 && res.places.size() == n && res.kinds.size() == n);
    checkpoint_maps of_cells;
    for (head_map * m : of_cells.all()) {
        read_vector(io, m->data, (uint64_t) shape.n_layer * shape.n_head_kv * n);
        if (!m->data.empty()) {
            check(m->data.size() == (uint64_t) shape.n_layer * shape.n_head_kv * n);
            m->n_layer   = shape.n_layer;
            m->n_head_kv = shape.n_head_kv;
            m->n_cells   = (int32_t) n;
        }
    }
    read_no_queries(io);
    res.pack(of_cells);
    read_vector(io, res.rank_scores, n);
    check(res.rank_scores.size() == n);
    read_vector(io, res.logits, UINT32_MAX);
    res.stored_at.resize(n);
    std::iota(res.stored_at.begin(), res.stored_at.end(), 0);
    const auto stored = std::make_shared<stored_rows>(shape.n_head_kv);
    for (int32_t il = 0; il < shape.n_layer; ++il) {
        layer_bytes bytes;
        read_vector(io, bytes.k, n * (uint64_t) shape.cell_bytes);
        read_vector(io, bytes.v, n * (uint64_t) shape.cell_bytes);
        auto held = res.of_layer(il, res.stored_at);
        check(are_of(bytes, kv, il, held.size()));
        stored->add(std::move(held), std::move(bytes));
    }
    res.stored = stored;
    return res;
}

}  // namespace elastic
