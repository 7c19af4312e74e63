#include "runtime/checkpoint.h"

#include <algorithm>
#include <set>

namespace elastic {

namespace {

head_map pick(const head_map & m, const std::vector<int32_t> & index) {
    if (m.data.empty()) {
        return {};
    }
    head_map res(m.n_layer, m.n_head_kv, (int32_t) index.size());
    for (int32_t il = 0; il < m.n_layer; ++il) {
        for (int32_t ih = 0; ih < m.n_head_kv; ++ih) {
            std::transform(index.begin(), index.end(), res.row(il, ih), [&](int32_t i) { return m.row(il, ih)[i]; });
        }
    }
    return res;
}

cell_importance pick(const cell_importance & s, const std::vector<int32_t> & index) {
    return { pick(s.sum, index), pick(s.decayed, index) };
}

// row j of n_rows is the same in both
bool same_row(const std::vector<uint8_t> & a, const std::vector<uint8_t> & b, int32_t n_head_kv, size_t n_rows, size_t j) {
    const size_t n = a.size() / (n_head_kv * n_rows);
    for (int32_t ih = 0; ih < n_head_kv; ++ih) {
        const size_t first = (ih * n_rows + j) * n;
        if (!std::equal(a.begin() + first, a.begin() + first + n, b.begin() + first)) {
            return false;
        }
    }
    return true;
}

}  // namespace

//
// taking
//

void checkpoints::take(llama_seq_id seq_id, const std::vector<float> & logits) {
    const int32_t n_most = parts.cfg.n_checkpoints;
    // a recurrent state is not copied, so that nothing could be restored with it
    if (n_most == 0 || !parts.active || parts.kv.n_cells(seq_id) == 0 || parts.kv.parts.recurrent) {
        return;
    }
    const uint32_t strm = parts.kv.stream(seq_id);

    checkpoint ck;
    ck.pos_end = parts.kv.pos_next(seq_id);
    ck.state   = parts.seqs.get(seq_id);
    ck.rows    = parts.kv.rows(seq_id);
    for (const int32_t row : ck.rows) {
        ck.places.push_back(parts.kv.place(strm, row));
        ck.kinds.push_back(parts.table.kind(strm, row));
    }
    ck.rank_scores       = parts.table.rank_scores(strm, ck.rows);
    ck.logits            = logits;
    checkpoint_maps maps = { parts.scores.gather(strm, ck.rows), parts.table.counts(strm, ck.rows), parts.bias.gather(strm, ck.rows) };
    ck.pack(maps);

    auto & of_seq = kept[seq_id];
    for (auto & old : of_seq) {  // of the same place, and its logits may be known
        if (old.pos_end == ck.pos_end && ck.logits.empty()) {
            ck.logits = std::move(old.logits);
        }
    }
    forget_after(seq_id, ck.places.back().pos);
    of_seq.push_back(std::move(ck));
    if ((int32_t) of_seq.size() > n_most) {
        of_seq.erase(of_seq.begin());
    }
}

std::vector<int32_t> checkpoints::rows_to_store(llama_seq_id seq_id, int32_t il) const {
    std::set<int32_t> res;
    for (const auto & ck : kept.at(seq_id)) {
        if (!ck.is_stored()) {
            const auto rows = ck.rows_of_layer(il);
            res.insert(rows.begin(), rows.end());
        }
    }
    return { res.begin(), res.end() };
}

bool checkpoints::lies_in_cache(llama_seq_id seq_id) const {
    const auto it = kept.find(seq_id);
    return it != kept.end() && std::any_of(it->second.begin(), it->second.end(), [](const checkpoint & ck) { return !ck.is_stored(); });
}

// read: K and V of rows of a layer
void checkpoints::store(llama_seq_id seq_id, const std::function<layer_bytes(int32_t, const std::vector<int32_t> &)> & read) {
    const auto stored = std::make_shared<stored_rows>(parts.kv.shape.n_head_kv);
    for (int32_t il = 0; il < parts.kv.shape.n_layer; ++il) {
        auto rows  = rows_to_store(seq_id, il);
        auto bytes = read(il, rows);
        stored->add(std::move(rows), std::move(bytes));
    }
    for (auto & ck : kept[seq_id]) {
        if (!ck.is_stored()) {
            ck.stored    = stored;
            ck.stored_at = ck.rows;
        }
    }
}

void checkpoints::before_change(llama_seq_id seq_id) {
    if (lies_in_cache(seq_id)) {
        parts.kv.synchronize();
        store(seq_id,
              [&](int32_t il, const std::vector<int32_t> & rows) { return read_layer_bytes(parts.kv, parts.kv.stream(seq_id), il, rows); });
    }
}

void checkpoints::before_change(llama_seq_id seq_id, const std::vector<kv_layer> & loaded) {
    if (lies_in_cache(seq_id)) {
        store(seq_id, [&](int32_t il, const std::vector<int32_t> & rows) { return read_layer_bytes(loaded[il], rows); });
    }
}

void checkpoints::write(const checkpoint & ck, llama_io_write_i & io, llama_seq_id seq_id) const {
    parts.kv.synchronize();
    ck.write(io, parts.kv, parts.kv.stream(seq_id));
}

void checkpoints::forget_after(llama_seq_id seq_id, llama_pos p0) {
    auto & of_seq = kept[seq_id];
    of_seq.erase(std::remove_if(of_seq.begin(), of_seq.end(), [&](const checkpoint & ck) { return !ck.ends_before(p0); }), of_seq.end());
}

int64_t checkpoints::n_bytes() const {
    int64_t                                      res = 0;
    std::set<std::shared_ptr<const stored_rows>> stored;
    for (const auto & [_, of_seq] : kept) {
        for (const auto & ck : of_seq) {
            res += ck.n_bytes();
            stored.insert(ck.stored);
        }
    }
    stored.erase(nullptr);
    for (const auto & rows : stored) {
        res += rows->n_bytes();
    }
    return res;
}

//
// finding
//

const checkpoint * checkpoints::newest(llama_seq_id seq_id) const {
    const auto it = kept.find(seq_id);
    return it == kept.end() || it->second.empty() || !can_restore(seq_id, it->second.back()) ? nullptr : &it->second.back();
}

const checkpoint * checkpoints::find(llama_seq_id seq_id, llama_pos pos_end) const {
    const auto it = kept.find(seq_id);
    if (it == kept.end()) {
        return nullptr;
    }
    for (const auto & ck : it->second) {
        if (ck.ends_before(pos_end) && pos_end <= ck.pos_end && can_restore(seq_id, ck)) {
            return &ck;
        }
    }
    return nullptr;
}

llama_pos checkpoints::last_before(llama_seq_id seq_id, llama_pos p0) const {
    llama_pos  res = 0;
    const auto it  = kept.find(seq_id);
    if (it == kept.end()) {
        return res;
    }
    for (const auto & ck : it->second) {
        if (ck.ends_before(p0) && can_restore(seq_id, ck)) {
            res = std::max(res, std::min(p0, ck.pos_end));
        }
    }
    return res;
}

// cell i of the checkpoint is where it was
bool checkpoints::still_same(llama_seq_id seq_id, const checkpoint & ck, size_t i) const {
    const uint32_t strm = parts.kv.stream(seq_id);
    return parts.kv.has(strm, ck.rows[i], seq_id) && parts.kv.place(strm, ck.rows[i]) == ck.places[i];
}

bool checkpoints::can_restore(llama_seq_id seq_id, const checkpoint & ck) const {
    if (ck.is_stored()) {
        return parts.kv.n_free(seq_id) + (int32_t) parts.kv.own_rows(seq_id).size() >= (int32_t) ck.rows.size();
    }
    for (size_t i = 0; i < ck.rows.size(); ++i) {
        if (!still_same(seq_id, ck, i)) {
            return false;
        }
    }
    return true;
}

//
// restoring
//

// cells that another sequence uses too, and that still are what they were  [n_cells]
std::vector<uint8_t> checkpoints::find_unchanged(llama_seq_id seq_id, const checkpoint & ck) const {
    const uint32_t            strm = parts.kv.stream(seq_id);
    const int32_t             size = parts.kv.shape.kv_size;
    std::vector<uint8_t>      res(ck.rows.size());
    std::map<int32_t, size_t> cells;  // by row
    for (size_t i = 0; i < ck.rows.size(); ++i) {
        res[i] = ck.rows[i] < size && still_same(seq_id, ck, i) && parts.kv.is_shared(strm, ck.rows[i]);
        if (res[i]) {
            cells[ck.rows[i]] = i;
        }
    }
    for (int32_t il = 0; il < parts.kv.shape.n_layer && !cells.empty(); ++il) {
        std::vector<int32_t> shared;  // rows that the layer held then
        std::vector<int32_t> then;    // and where they are stored
        for (const auto & [row, i] : cells) {
            const bool now = !parts.bias.is_masked(strm, row, il);
            if (now != ck.holds(il, i)) {
                res[i] = 0;
            } else if (now) {
                shared.push_back(row);
                then.push_back(ck.stored_at[i]);
            }
        }
        const layer_bytes a = read_layer_bytes(parts.kv, strm, il, shared);
        const layer_bytes b = ck.stored->pick(il, then);
        for (size_t j = 0; j < shared.size(); ++j) {
            const int32_t n_head = parts.kv.shape.n_head_kv;
            if (!same_row(a.k, b.k, n_head, shared.size(), j) || !same_row(a.v, b.v, n_head, shared.size(), j)) {
                res[cells[shared[j]]] = 0;
            }
        }
    }
    return res;
}

// free rows for the cells of a checkpoint: where they were, if nobody else is there by now
std::vector<int32_t> checkpoints::place_rows(llama_seq_id seq_id, const checkpoint & ck) const {
    const uint32_t    strm = parts.kv.stream(seq_id);
    std::set<int32_t> taken;
    for (const int32_t row : ck.rows) {
        if (row < parts.kv.shape.kv_size && parts.kv.is_free(strm, row)) {
            taken.insert(row);
        }
    }
    std::vector<int32_t> res;
    int32_t              next = 0;
    std::set<int32_t>    given;
    for (const int32_t row : ck.rows) {
        if (taken.count(row) && given.insert(row).second) {
            res.push_back(row);
            continue;
        }
        while (!parts.kv.is_free(strm, next) || taken.count(next)) {
            ++next;
        }
        taken.insert(next);
        given.insert(next);
        res.push_back(next);
    }
    return res;
}

// the cells of a stored checkpoint are put into free rows, with K and V
void checkpoints::put_back(llama_seq_id seq_id, checkpoint & ck, const std::vector<uint8_t> & unchanged) {
    const uint32_t strm   = parts.kv.stream(seq_id);
    const auto     before = ck.rows;

    ck.rows = place_rows(seq_id, ck);
    for (size_t i = 0; i < ck.rows.size(); ++i) {
        if (unchanged[i]) {
            ck.rows[i] = before[i];
            continue;
        }
        parts.kv.put(strm, ck.rows[i], ck.places[i], seq_id);
        parts.reset_cell(strm, ck.rows[i], ck.kinds[i]);
    }
    parts.memory.wrote(strm, *std::max_element(ck.rows.begin(), ck.rows.end()) + 1);
    for (int32_t il = 0; il < parts.kv.shape.n_layer; ++il) {
        write_layer_bytes(parts.kv, strm, il, ck.rows_of_layer(il), ck.bytes_of_layer(il, parts.kv, strm));
    }
}

// what another sequence looks at too stays as it is
void checkpoints::put_scores_back(llama_seq_id seq_id, const checkpoint & ck) {
    const uint32_t       strm = parts.kv.stream(seq_id);
    std::vector<int32_t> own;
    std::vector<int32_t> rows;
    std::vector<float>   rank_scores;
    for (size_t i = 0; i < ck.rows.size(); ++i) {
        if (!parts.kv.is_shared(strm, ck.rows[i])) {
            own.push_back((int32_t) i);
            rows.push_back(ck.rows[i]);
            rank_scores.push_back(ck.rank_scores[i]);
            parts.table.set_kind(strm, ck.rows[i], ck.kinds[i]);
        }
    }
    const checkpoint_maps maps = ck.unpack();
    parts.scores.scatter(strm, rows, pick(maps.scores, own));
    parts.table.set_counts(strm, rows, pick(maps.counts, own));
    parts.table.set_rank_scores(strm, rows, rank_scores);
    parts.bias.scatter(strm, rows, pick(maps.bias, own));
    parts.memory.dirtied(strm);
}

void checkpoints::restore(llama_seq_id seq_id, llama_pos pos_end) {
    parts.kv.settle();
    forget_after(seq_id, pos_end);
    auto & ck = kept[seq_id].back();

    const uint32_t             strm      = parts.kv.stream(seq_id);
    const std::vector<uint8_t> unchanged = ck.is_stored() ? find_unchanged(seq_id, ck) : std::vector<uint8_t>(ck.rows.size(), 1);
    std::set<int32_t>          stays;
    for (size_t i = 0; i < ck.rows.size(); ++i) {
        if (unchanged[i]) {
            stays.insert(ck.rows[i]);
        }
    }
    for (const int32_t row : parts.kv.rows(seq_id)) {
        if (!stays.count(row) && parts.kv.remove(strm, row, seq_id)) {
            parts.reset_cell(strm, row, cell_kind::text);
        }
    }
    if (ck.is_stored()) {
        put_back(seq_id, ck, unchanged);
    }
    put_scores_back(seq_id, ck);

    parts.seqs.at(seq_id) = ck.state;
    parts.windows.forget(seq_id);  // its prompt is over
    parts.kv.search_from(strm, 0);
}

}  // namespace elastic
