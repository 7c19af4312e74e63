#include "runtime/state_io.h"

#include "llama-io.h"

#include <stdexcept>

namespace elastic {

namespace {

constexpr uint32_t STATE_MAGIC = 0x35534c45;  // "ELS5"

struct state_header {
    uint32_t magic       = STATE_MAGIC;
    int32_t  n_layer     = 0;
    int32_t  n_head_kv   = 0;
    uint32_t has_sum     = 0;
    uint32_t has_count   = 0;
    uint32_t has_bias    = 0;
    uint32_t has_decayed = 0;
    uint32_t has_window  = 0;  // 2: the last queries of prompts that are not compressed, one by one; 1: their sum, of earlier versions
    uint32_t n_seqs      = 0;

    bool same_maps(const state_header & other) const {
        return has_sum == other.has_sum && has_count == other.has_count && has_bias == other.has_bias && has_decayed == other.has_decayed &&
               has_window == other.has_window;
    }
};

struct state_sequence {
    int32_t  seq_id         = 0;
    int32_t  n_cells        = 0;
    int64_t  n_tokens       = 0;
    int32_t  pos_prompt     = -1;
    int32_t  pos_turn       = 0;
    int32_t  pos_moved      = -1;
    int32_t  n_prompt_cells = 0;
    uint32_t pending        = 0;  // 1: the prompt is not compressed; 2: nor does it end with a token that wanted logits
    int32_t  n_unscored     = 0;
    int32_t  n_checkpoints  = 0;  // 1: the newest one follows
    int32_t  pos_first      = 0;
};

state_header header_of(const cache_parts & parts) {
    state_header h;
    h.n_layer     = parts.kv.shape.n_layer;
    h.n_head_kv   = parts.kv.shape.n_head_kv;
    h.has_sum     = parts.scores.needs.sum;
    h.has_count   = parts.table.has_counts();
    h.has_bias    = parts.bias.is_kept();
    h.has_decayed = parts.scores.has_decayed();
    h.has_window  = parts.windows.any() ? 2 : 0;
    return h;
}

// the maps of a sequence's cells, in the order of the state
struct sequence_maps {
    cell_importance scores;
    head_map        counts;
    head_map        bias;

    template <typename F> void each(const state_header & h, F fn) {
        fn(h.has_sum, scores.sum);
        fn(h.has_count, counts);
        fn(h.has_bias, bias);
        fn(h.has_decayed, scores.decayed);
    }
};

//
// writing
//

void write_window(const cache_parts & parts, llama_io_write_i & io, llama_seq_id seq_id, const std::vector<int32_t> & rows) {
    const auto    queries = parts.windows.gather(seq_id, rows);
    const int32_t n       = (int32_t) queries.size();
    io.write(&n, sizeof(n));
    for (const head_map & m : queries) {
        io.write(m.data.data(), m.data.size() * sizeof(float));
    }
}

void write_sequence(const cache_parts & parts, const checkpoints & taken, llama_io_write_i & io, const state_header & h,
                    llama_seq_id seq_id) {
    const auto     st   = parts.seqs.get(seq_id);
    const auto     rows = parts.kv.rows(seq_id);
    const uint32_t strm = parts.kv.stream(seq_id);

    state_sequence s;
    s.seq_id         = seq_id;
    s.n_cells        = (int32_t) rows.size();
    s.n_tokens       = st.n_tokens;
    s.pos_first      = st.pos_first;
    s.pos_prompt     = st.pos_prompt;
    s.pos_turn       = st.pos_turn;
    s.pos_moved      = st.pos_moved;
    s.n_prompt_cells = st.n_prompt_cells;
    s.pending        = !st.pending ? 0 : st.has_output ? 1 : 2;
    s.n_unscored     = st.n_unscored;

    // the one after the last prompt, so that its answer can be taken back after loading too
    const checkpoint * newest = st.pending ? nullptr : taken.newest(seq_id);
    s.n_checkpoints           = newest ? 1 : 0;
    io.write(&s, sizeof(s));

    std::vector<uint8_t> kinds;
    for (const int32_t row : rows) {
        kinds.push_back((uint8_t) parts.table.kind(strm, row));
    }
    io.write(kinds.data(), kinds.size());

    sequence_maps maps = { parts.scores.gather(strm, rows), parts.table.counts(strm, rows), parts.bias.gather(strm, rows) };
    maps.each(h, [&](uint32_t has, const head_map & m) {
        if (has) {
            io.write(m.data.data(), m.data.size() * sizeof(float));
        }
    });
    if (h.has_window) {
        write_window(parts, io, seq_id, rows);
    }
    const auto rank_scores = parts.table.rank_scores(strm, rows);
    io.write(rank_scores.data(), rank_scores.size() * sizeof(float));
    if (newest) {
        taken.write(*newest, io, seq_id);
    }
}

//
// reading
//

// a state saved without the elastic cache: ordinary cells, each one token
void take_as_ordinary(cache_parts & parts, llama_seq_id seq_id) {
    sequence_state st;
    st.n_tokens       = parts.kv.n_cells(seq_id);
    st.n_prompt_cells = parts.kv.n_cells(seq_id);
    st.pos_first      = parts.kv.rows(seq_id).empty() ? 0 : parts.kv.pos(parts.kv.stream(seq_id), parts.kv.rows(seq_id).front());
    st.pos_prompt     = parts.kv.pos_max(seq_id);
    st.pos_changed    = st.pos_prompt;

    parts.seqs.at(seq_id) = st;
    parts.windows.forget(seq_id);
    for (const int32_t row : parts.kv.rows(seq_id)) {
        parts.reset_cell(parts.kv.stream(seq_id), row, cell_kind::text);
    }
}

std::runtime_error other_policy() {
    return std::runtime_error("elastic state: saved with a policy that keeps other data per cell; load it with the same policy");
}

void check_header(const state_header & h, const state_header & own) {
    if (h.n_layer != own.n_layer || h.n_head_kv != own.n_head_kv) {
        throw std::runtime_error("elastic state: saved with another model (layers or KV heads differ)");
    }
    if (h.has_window == 1) {
        throw std::runtime_error("elastic state: saved by an earlier version, which kept the last queries of a prompt as a sum only");
    }
    // more than this policy looks at is read and left, unless cells depend on it
    const bool lacks   = h.has_sum < own.has_sum || h.has_decayed < own.has_decayed || h.has_window < own.has_window;
    const bool depends = h.has_bias > own.has_bias || h.has_count > own.has_count;
    if (lacks || depends) {
        throw other_policy();
    }
}

void read_window(cache_parts & parts, llama_io_read_i & io, llama_seq_id seq_id, const std::vector<int32_t> & rows) {
    int32_t n = 0;
    io.read(&n, sizeof(n));
    if (n < 0) {
        throw std::runtime_error("elastic state: a window of queries is damaged");
    }
    std::vector<head_map> queries;
    for (int32_t i = 0; i < n; ++i) {
        head_map m(parts.kv.shape.n_layer, parts.kv.shape.n_head_kv, (int32_t) rows.size());
        io.read(m.data.data(), m.data.size() * sizeof(float));
        if (i < parts.windows.n_window) {
            queries.push_back(std::move(m));
        }
    }
    parts.windows.set(seq_id, rows, queries);
}

void read_cells(cache_parts & parts, llama_io_read_i & io, const state_header & h, llama_seq_id seq_id) {
    const auto     rows = parts.kv.rows(seq_id);
    const uint32_t strm = parts.kv.stream(seq_id);
    const auto &   dims = parts.kv.shape;

    std::vector<uint8_t> kinds(rows.size());
    io.read(kinds.data(), kinds.size());
    for (size_t j = 0; j < rows.size(); ++j) {
        if (kinds[j] > (uint8_t) cell_kind::generated) {
            throw std::runtime_error("elastic state: unknown kind of cell");
        }
        parts.reset_cell(strm, rows[j], (cell_kind) kinds[j]);
    }

    sequence_maps maps;
    maps.each(h, [&](uint32_t has, head_map & m) {
        if (has) {
            m = head_map(dims.n_layer, dims.n_head_kv, (int32_t) rows.size());
            io.read(m.data.data(), m.data.size() * sizeof(float));
        }
    });
    parts.scores.scatter(strm, rows, maps.scores);
    if (h.has_count) {
        parts.table.set_counts(strm, rows, maps.counts);
    }
    if (h.has_bias) {
        parts.bias.scatter(strm, rows, maps.bias);
    }
    parts.windows.forget(seq_id);
    if (h.has_window) {
        read_window(parts, io, seq_id, rows);
    }
    std::vector<float> rank_scores(rows.size());
    io.read(rank_scores.data(), rank_scores.size() * sizeof(float));
    parts.table.set_rank_scores(strm, rows, rank_scores);
    parts.memory.dirtied(strm);  // readers may write the rows after this
}

void read_sequence(cache_parts & parts, checkpoints & taken, llama_io_read_i & io, const state_header & h, const state_header & own,
                   llama_seq_id wanted) {
    state_sequence s;
    io.read(&s, sizeof(s));

    const llama_seq_id seq_id = wanted < 0 ? s.seq_id : wanted;
    if (seq_id < 0 || seq_id >= parts.kv.n_seq_max() || parts.kv.n_cells(seq_id) != s.n_cells) {
        throw std::runtime_error("elastic state: the cells of a sequence do not match its saved description");
    }
    if (s.pos_moved >= 0 && h.has_count < own.has_count) {
        throw other_policy();
    }
    read_cells(parts, io, h, seq_id);

    auto & st         = parts.seqs.at(seq_id);
    st.n_tokens       = s.n_tokens;
    st.pos_first      = s.pos_first;
    st.pos_prompt     = s.pos_prompt;
    st.pos_turn       = s.pos_turn;
    st.pos_moved      = s.pos_moved;
    st.pos_changed    = parts.kv.pos_max(seq_id);  // the importance is of all that is there
    st.n_prompt_cells = s.n_prompt_cells;
    st.pending        = s.pending != 0;
    st.has_output     = s.pending != 2;
    st.n_unscored     = s.n_unscored;

    taken.forget(seq_id);
    if (s.n_checkpoints > 0) {
        checkpoint ck      = checkpoint::read(io, parts.kv);
        ck.state.pos_first = s.pos_first;
        if (parts.cfg.n_checkpoints > 0 && h.same_maps(own)) {
            taken.add(seq_id, std::move(ck));
        }
    }
}

}  // namespace

void write_state(const cache_parts & parts, const checkpoints & taken, llama_io_write_i & io, llama_seq_id seq_id) {
    if (!parts.active) {
        return;
    }
    std::vector<llama_seq_id> ids;
    for (const llama_seq_id id : parts.seqs.ids()) {
        if ((seq_id < 0 || id == seq_id) && parts.kv.n_cells(id) > 0) {
            ids.push_back(id);
        }
    }
    state_header h = header_of(parts);
    h.n_seqs       = (uint32_t) ids.size();
    io.write(&h, sizeof(h));
    for (const llama_seq_id id : ids) {
        write_sequence(parts, taken, io, h, id);
    }
}

void read_state(cache_parts & parts, checkpoints & taken, prompt_logits & logits, llama_io_read_i & io, llama_seq_id seq_id) {
    if (!parts.active) {
        return;
    }
    for (int32_t s = 0; s < parts.kv.shape.n_stream; ++s) {
        parts.memory.wrote(s, parts.kv.n_used(s));
    }
    state_header h;
    try {
        io.read(&h, sizeof(h));
    } catch (const std::exception &) {
        h.magic = 0;
    }
    for (llama_seq_id id = 0; id < parts.kv.n_seq_max(); ++id) {
        if ((seq_id < 0 || id == seq_id) && parts.kv.n_cells(id) > 0) {
            logits.forget(id);
            if (h.magic != STATE_MAGIC) {
                taken.forget(id);
                take_as_ordinary(parts, id);
            }
        }
    }
    if (h.magic != STATE_MAGIC) {
        return;
    }
    const state_header own = header_of(parts);
    check_header(h, own);
    for (uint32_t i = 0; i < h.n_seqs; ++i) {
        read_sequence(parts, taken, io, h, own, seq_id);
    }
}

}  // namespace elastic
