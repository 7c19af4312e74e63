#include "runtime/checkpoint.h"

#include "kernels/kv_rows.h"

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
    cell_importance res = { pick(s.sum, index), pick(s.decayed, index), pick(s.windowed, index), {} };
    for (const auto & m : s.queries) {
        res.queries.push_back(pick(m, index));
    }
    return res;
}

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

// row j of a stored checkpoint's layer is what lies in the cache
bool equals(const kv_rows & t, int32_t row, const std::vector<uint8_t> & stored, size_t j, size_t n_rows) {
    const size_t n   = head_bytes(t);
    const auto   now = read_bytes(t, { row });
    for (int32_t ih = 0; ih < t.n_head_kv; ++ih) {
        if (!std::equal(now.begin() + ih * n, now.begin() + (ih + 1) * n, stored.begin() + (ih * n_rows + j) * n)) {
            return false;
        }
    }
    return true;
}

}  // namespace

std::vector<int32_t> checkpoint::rows_of_layer(int32_t il) const {
    std::vector<int32_t> res;
    for (size_t i = 0; i < rows.size(); ++i) {
        if (bias.data.empty() || bias.row(il, 0)[i] != masked_bias) {
            res.push_back(rows[i]);
        }
    }
    return res;
}

void checkpoint::store(int32_t il, const kv_layer & layer) {
    k.push_back(read_bytes(layer.k, rows_of_layer(il)));
    v.push_back(read_bytes(layer.v, rows_of_layer(il)));
}

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
    ck.rank_scores = parts.table.rank_scores(strm, ck.rows);
    ck.scores      = parts.scores.gather_exact(strm, ck.rows);
    ck.counts      = parts.table.counts(strm, ck.rows);
    ck.bias        = parts.bias.gather(strm, ck.rows);
    ck.logits      = logits;

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

void checkpoints::before_change(llama_seq_id seq_id) {
    const auto lying = in_cache(seq_id);
    if (lying.empty()) {
        return;
    }
    parts.kv.synchronize();
    for (int32_t il = 0; il < parts.kv.shape.n_layer; ++il) {  // one in host memory at a time
        kv_layer layer = layer_of(parts.kv, il, parts.kv.stream(seq_id));
        layer.load(parts.kv.n_used(parts.kv.stream(seq_id)));
        for (auto * ck : lying) {
            ck->store(il, layer);
        }
    }
}

void checkpoints::before_change(llama_seq_id seq_id, const std::vector<kv_layer> & loaded) {
    for (auto * ck : in_cache(seq_id)) {
        for (int32_t il = 0; il < parts.kv.shape.n_layer; ++il) {
            ck->store(il, loaded[il]);
        }
    }
}

std::vector<checkpoint *> checkpoints::in_cache(llama_seq_id seq_id) {
    std::vector<checkpoint *> res;
    for (auto & ck : kept[seq_id]) {
        if (!ck.is_stored()) {
            res.push_back(&ck);
        }
    }
    return res;
}

void checkpoints::forget_after(llama_seq_id seq_id, llama_pos p0) {
    auto & of_seq = kept[seq_id];
    of_seq.erase(std::remove_if(of_seq.begin(), of_seq.end(), [&](const checkpoint & ck) { return !ck.ends_before(p0); }), of_seq.end());
}

int64_t checkpoints::n_bytes() const {
    int64_t res = 0;
    for (const auto & [_, of_seq] : kept) {
        for (const auto & ck : of_seq) {
            res += ck.n_bytes();
        }
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
        kv_layer layer = layer_of(parts.kv, il, strm);
        layer.load(parts.kv.n_used(strm));
        const auto        rows = ck.rows_of_layer(il);
        std::set<int32_t> held;  // by the layer, now
        for (const auto & [row, i] : cells) {
            if (!parts.bias.is_masked(strm, row, il)) {
                held.insert(row);
            }
        }
        for (size_t j = 0; j < rows.size(); ++j) {
            const auto it = cells.find(rows[j]);
            if (it == cells.end()) {
                continue;
            }
            const bool same = held.erase(rows[j]) > 0 && equals(layer.k, rows[j], ck.k[il], j, rows.size()) &&
                              equals(layer.v, rows[j], ck.v[il], j, rows.size());
            if (!same) {
                res[it->second] = 0;
            }
        }
        for (const int32_t row : held) {  // and not then
            res[cells[row]] = 0;
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
        kv_layer layer = layer_of(parts.kv, il, strm);
        layer.load(parts.kv.n_used(strm));
        write_bytes(layer.k, ck.rows_of_layer(il), ck.k[il]);
        write_bytes(layer.v, ck.rows_of_layer(il), ck.v[il]);
        layer.store(parts.kv.n_used(strm));
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
    parts.scores.scatter_exact(strm, rows, pick(ck.scores, own));
    parts.table.set_counts(strm, rows, pick(ck.counts, own));
    parts.table.set_rank_scores(strm, rows, rank_scores);
    parts.bias.scatter(strm, rows, pick(ck.bias, own));
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
    parts.kv.search_from(strm, 0);
}

}  // namespace elastic
