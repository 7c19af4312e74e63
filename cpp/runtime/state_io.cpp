// The block that the elastic cache appends to llama.cpp's state: what is known of each sequence and its cells.

#include "runtime/elastic_cache.h"

#include "llama-io.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <stdexcept>

namespace elastic {

static constexpr uint32_t STATE_MAGIC = 0x34534c45;  // "ELS4"

struct state_header {
    uint32_t magic      = STATE_MAGIC;
    int32_t  n_layer    = 0;
    int32_t  n_head_kv  = 0;
    uint32_t has_mass   = 0;
    uint32_t has_count  = 0;
    uint32_t has_bias   = 0;
    uint32_t has_fading = 0;
    uint32_t has_window = 0;
    uint32_t n_seqs     = 0;
};

struct state_sequence {
    int32_t  seq_id         = 0;
    int32_t  n_cells        = 0;
    int64_t  n_tokens       = 0;
    int32_t  pos_prompt     = -1;
    int32_t  pos_turn       = 0;
    int32_t  pos_moved      = -1;
    int32_t  n_prompt_cells = 0;
    uint32_t pending        = 0;
    int32_t  n_unscored     = 0;
    int32_t  n_checkpoints  = 0;  // 1: the newest one follows
    int32_t  reserved       = 0;  // no padding that would be written as it is
};

void elastic_cache::state_write(llama_io_write_i & io, llama_seq_id seq_id) const {
    if (!active()) {
        return;
    }

    std::vector<llama_seq_id> ids;
    for (const auto & [id, st] : seqs) {
        if ((seq_id < 0 || id == seq_id) && n_cells(id) > 0) {
            ids.push_back(id);
        }
    }

    state_header h;
    h.n_layer    = shape.n_layer;
    h.n_head_kv  = shape.n_head_kv;
    h.has_mass   = store->has_mass();
    h.has_count  = store->has_count();
    h.has_bias   = store->has_bias_map();
    h.has_fading = store->has_fading();
    h.has_window = store->has_window();
    h.n_seqs     = (uint32_t) ids.size();
    io.write(&h, sizeof(h));

    for (const llama_seq_id id : ids) {
        const auto     st   = sequence(id);
        const auto     rows = logical_cells(id);
        const uint32_t strm = kv.get_stream(id);

        state_sequence s;
        s.seq_id         = id;
        s.n_cells        = (int32_t) rows.size();
        s.n_tokens       = st.n_tokens;
        s.pos_prompt     = st.pos_prompt;
        s.pos_turn       = st.pos_turn;
        s.pos_moved      = st.pos_moved;
        s.n_prompt_cells = st.n_prompt_cells;
        s.pending        = st.pending;
        s.n_unscored     = st.n_unscored;

        // the one after the last prompt, so that its answer can be taken back after loading too
        const auto   kept = checkpoints.find(id);
        checkpoint * last = kept == checkpoints.end() || kept->second.empty() || st.pending ? nullptr : &kept->second.back();
        if (last && can_restore(id, *last)) {
            store_checkpoints(id);
            s.n_checkpoints = 1;
        }
        io.write(&s, sizeof(s));

        std::vector<uint8_t> kinds;
        for (const int32_t row : rows) {
            kinds.push_back((uint8_t) store->kind(strm, row));
        }
        io.write(kinds.data(), kinds.size());

        const cell_state state = store->gather(strm, rows);
        const auto       put   = [&](uint32_t has, const head_map & m) {
            if (has) {
                io.write(m.data.data(), m.data.size() * sizeof(float));
            }
        };
        put(h.has_mass, state.mass);
        put(h.has_count, state.count);
        put(h.has_bias, state.bias);
        put(h.has_fading, store->gather_fading(strm, rows));
        put(h.has_window, store->gather_window(strm, rows));

        std::vector<float> totals;
        for (const int32_t row : rows) {
            totals.push_back(store->total(strm, row));
        }
        io.write(totals.data(), totals.size() * sizeof(float));

        if (s.n_checkpoints > 0) {
            last->write(io);
        }
    }
}

// A whole state comes stream by stream, and readers store all of it at the end: the stride must not change until then.
void elastic_cache::on_restored(llama_seq_id seq_id) {
    if (!active()) {
        return;
    }
    if (seq_id < 0 && shape.n_stream > 1) {
        restore_layout();
        spare_v = true;
    } else {
        ctx.memory_update(false);  // copies of whole streams that still wait
        grow_v(false);
    }
    for (int32_t s = 0; s < shape.n_stream; ++s) {
        note_touched(s, n_used(s));
    }
}

void elastic_cache::state_read(llama_io_read_i & io, llama_seq_id seq_id) {
    if (!active()) {
        return;
    }

    state_header h;
    try {
        io.read(&h, sizeof(h));
    } catch (const std::exception &) {
        h.n_seqs = 0;
        h.magic  = 0;
    }

    if (h.magic != STATE_MAGIC) {
        // a state saved without the elastic cache: ordinary cells, each one token
        for (llama_seq_id id = 0; id < (llama_seq_id) kv.get_n_seq_max(); ++id) {
            if ((seq_id < 0 || id == seq_id) && n_cells(id) > 0) {
                auto & st         = seqs[id];
                st                = {};
                st.n_tokens       = n_cells(id);
                st.n_prompt_cells = n_cells(id);
                st.pos_prompt     = kv.seq_pos_max(id);
                st.pos_changed    = st.pos_prompt;
                checkpoints.erase(id);
                prompt_ends.erase(id);
                for (const int32_t row : logical_cells(id)) {
                    store->reset_cell(kv.get_stream(id), row, cell_kind::text);
                }
            }
        }
        return;
    }

    if (h.n_layer != shape.n_layer || h.n_head_kv != shape.n_head_kv) {
        throw std::runtime_error("elastic state: saved with another model (layers or KV heads differ)");
    }
    // more than this policy looks at is read and left, unless cells depend on it
    const bool lacks =
        (!h.has_mass && store->has_mass()) || (!h.has_fading && store->has_fading()) || (!h.has_window && store->has_window());
    const bool depends      = (h.has_bias && !store->has_bias_map()) || (h.has_count && !store->has_count());
    const auto other_policy = [] {
        return std::runtime_error("elastic state: saved with a policy that keeps other data per cell; load it with the same policy");
    };
    if (lacks || depends) {
        throw other_policy();
    }

    const bool same_maps = h.has_mass == store->has_mass() && h.has_count == store->has_count() && h.has_bias == store->has_bias_map() &&
                           h.has_fading == store->has_fading() && h.has_window == store->has_window();

    for (uint32_t i = 0; i < h.n_seqs; ++i) {
        state_sequence s;
        io.read(&s, sizeof(s));

        const llama_seq_id id = seq_id < 0 ? s.seq_id : seq_id;
        if (id < 0 || id >= (llama_seq_id) kv.get_n_seq_max() || n_cells(id) != s.n_cells) {
            throw std::runtime_error("elastic state: the cells of a sequence do not match its saved description");
        }

        if (s.pos_moved >= 0 && !h.has_count && store->has_count()) {
            throw other_policy();
        }

        const auto     rows = logical_cells(id);
        const uint32_t strm = kv.get_stream(id);

        std::vector<uint8_t> kinds(rows.size());
        io.read(kinds.data(), kinds.size());
        for (size_t j = 0; j < rows.size(); ++j) {
            if (kinds[j] > (uint8_t) cell_kind::generated) {
                throw std::runtime_error("elastic state: unknown kind of cell");
            }
            store->reset_cell(strm, rows[j], (cell_kind) kinds[j]);
        }

        cell_state state = store->gather(strm, rows);
        const auto take  = [&](uint32_t has, head_map & m) {
            if (has) {
                io.read(m.data.data(), m.data.size() * sizeof(float));
            }
        };
        take(h.has_mass, state.mass);
        take(h.has_count, state.count);
        take(h.has_bias, state.bias);
        store->scatter(strm, rows, state);
        refilled[strm] = 1;  // readers may write the rows after this

        head_map recent(shape.n_layer, shape.n_head_kv, (int32_t) rows.size());
        take(h.has_fading, recent);
        store->scatter_fading(strm, rows, recent);
        take(h.has_window, recent);
        store->scatter_window(strm, rows, recent);

        std::vector<float> totals(rows.size());
        io.read(totals.data(), totals.size() * sizeof(float));
        store->set_totals(strm, rows, totals);

        auto & st         = seqs[id];
        st.n_tokens       = s.n_tokens;
        st.pos_prompt     = s.pos_prompt;
        st.pos_turn       = s.pos_turn;
        st.pos_moved      = s.pos_moved;
        st.pos_changed    = kv.seq_pos_max(id);  // the scores are of all that is there
        st.n_prompt_cells = s.n_prompt_cells;
        st.pending        = s.pending != 0;
        st.n_unscored     = s.n_unscored;

        checkpoints.erase(id);
        prompt_ends.erase(id);
        if (s.n_checkpoints > 0) {
            checkpoint ck = checkpoint::read(io, shape);
            if (cfg.n_checkpoints > 0 && same_maps) {
                checkpoints[id].push_back(std::move(ck));
            }
        }
    }
}

}  // namespace elastic
