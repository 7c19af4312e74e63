// Taking back: checkpoints are taken before a prompt and after its compression, and a cut at one of them restores it.

#include "core/rows.h"
#include "runtime/elastic_cache.h"

#include "llama-context.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

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

cell_scores pick(const cell_scores & s, const std::vector<int32_t> & index) {
    cell_scores res;
    res.state    = { pick(s.state.mass, index), pick(s.state.count, index), pick(s.state.bias, index) };
    res.fading   = pick(s.fading, index);
    res.windowed = pick(s.windowed, index);
    for (const auto & m : s.queries) {
        res.queries.push_back(pick(m, index));
    }
    for (const int32_t i : index) {
        res.totals.push_back(s.totals[i]);
    }
    return res;
}

// the rows of a checkpoint that a layer holds
std::vector<int32_t> rows_of_layer(const checkpoint & ck, int32_t il) {
    const auto &         bias = ck.scores.state.bias;
    std::vector<int32_t> res;
    for (size_t i = 0; i < ck.rows.size(); ++i) {
        if (bias.data.empty() || bias.row(il, 0)[i] != absent_bias) {
            res.push_back(ck.rows[i]);
        }
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

void elastic_cache::note_change(llama_seq_id seq_id, llama_pos pos, bool moved) {
    auto & st      = seqs[seq_id];
    st.pos_changed = std::max(st.pos_changed, pos);
    if (moved) {
        st.pos_moved = std::max(st.pos_moved, pos);
    }
}

//
// logits of a prompt's end
//

void elastic_cache::note_outputs(const llama_batch & batch) {
    outputs.clear();
    n_to_compute = batch.n_tokens;
    if (trying || cfg.n_checkpoints == 0) {
        return;
    }
    std::map<llama_seq_id, int32_t> last;
    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        for (int32_t j = 0; j < batch.n_seq_id[i]; ++j) {
            last[batch.seq_id[i][j]] = i;
        }
    }
    for (const auto & [seq_id, i] : last) {
        if (is_prompt(seq_id) && batch.logits && batch.logits[i]) {
            outputs.push_back({ seq_id, batch.pos[i] + 1, i });
        }
    }
}

// what the last batch says at the end of its prompts, before another one overwrites it
void elastic_cache::take_logits() {
    const bool complete = n_to_compute == 0;
    const auto wanted   = std::move(outputs);
    outputs.clear();
    if (wanted.empty() || !complete) {
        return;
    }
    ctx.synchronize();
    if (!ctx.get_logits()) {
        return;
    }
    const int32_t n_vocab = (int32_t) ctx.get_model().vocab.n_tokens();
    for (const auto & out : wanted) {
        if (const float * row = ctx.get_logits_ith(out.index)) {
            prompt_ends[out.seq_id] = { out.pos_end, { row, row + n_vocab } };
        }
    }
}

bool elastic_cache::restore_logits(llama_seq_id seq_id) {
    take_logits();
    const llama_pos            pos_end = kv.seq_pos_max(seq_id) + 1;
    const auto *               ck      = find_checkpoint(seq_id, pos_end);
    const auto                 it      = prompt_ends.find(seq_id);
    const std::vector<float> * logits  = nullptr;
    if (it != prompt_ends.end() && it->second.pos_end == pos_end) {
        logits = &it->second.logits;
    } else if (ck && !ck->logits.empty()) {
        logits = &ck->logits;
    }
    if (!logits || n_cells(seq_id) == 0 || logits->size() != ctx.get_model().vocab.n_tokens()) {
        return false;
    }
    ctx.set_logits(logits->data());
    return true;
}

//
// checkpoints
//

int64_t elastic_cache::checkpoint_bytes() const {
    int64_t res = 0;
    for (const auto & [_, kept] : checkpoints) {
        for (const auto & ck : kept) {
            res += ck.n_bytes();
        }
    }
    return res;
}

void elastic_cache::take_checkpoint(llama_seq_id seq_id) {
    if (cfg.n_checkpoints == 0 || !active() || n_cells(seq_id) == 0) {
        return;
    }
    const uint32_t strm  = kv.get_stream(seq_id);
    const auto &   cells = kv.get_cells(seq_id);

    checkpoint ck;
    ck.pos_end = kv.seq_pos_max(seq_id) + 1;
    ck.state   = seqs[seq_id];
    ck.rows    = logical_cells(seq_id);
    for (const int32_t row : ck.rows) {
        ck.pos.push_back(cells.pos_get(row));
        ck.ext.push_back(cells.ext_get(row));
        ck.kinds.push_back(store->kind(strm, row));
    }
    ck.scores = store->gather_scores(strm, ck.rows);

    const auto it = prompt_ends.find(seq_id);
    if (it != prompt_ends.end() && it->second.pos_end == ck.pos_end) {
        ck.logits = it->second.logits;
    }

    auto & kept = checkpoints[seq_id];
    for (auto & old : kept) {  // of the same place, and its logits may be known
        if (old.pos_end == ck.pos_end && ck.logits.empty()) {
            ck.logits = std::move(old.logits);
        }
    }
    kept.erase(std::remove_if(kept.begin(), kept.end(), [&](const checkpoint & old) { return old.pos_end >= ck.pos_end; }), kept.end());
    kept.push_back(std::move(ck));
    if ((int32_t) kept.size() > cfg.n_checkpoints) {
        kept.erase(kept.begin());
    }
}

void elastic_cache::store_rows(llama_seq_id seq_id, checkpoint & ck) const {
    ctx.synchronize();
    for (int32_t il = 0; il < shape.n_layer; ++il) {
        kv_layer_access layer(kv, shape, il, kv.get_stream(seq_id));
        layer.load_k();
        layer.load_v();
        const auto rows = rows_of_layer(ck, il);
        ck.k.push_back(read_bytes(layer.k, rows));
        ck.v.push_back(read_bytes(layer.v, rows));
    }
}

void elastic_cache::store_checkpoints(llama_seq_id seq_id) const {
    for (auto & ck : checkpoints[seq_id]) {
        if (!ck.is_stored()) {
            store_rows(seq_id, ck);
        }
    }
}

const checkpoint * elastic_cache::find_checkpoint(llama_seq_id seq_id, llama_pos pos_end) const {
    const auto it = checkpoints.find(seq_id);
    if (it == checkpoints.end()) {
        return nullptr;
    }
    for (const auto & ck : it->second) {
        if (ck.pos_end == pos_end && can_restore(seq_id, ck)) {
            return &ck;
        }
    }
    return nullptr;
}

bool elastic_cache::can_restore(llama_seq_id seq_id, const checkpoint & ck) const {
    const uint32_t strm  = kv.get_stream(seq_id);
    const auto &   cells = kv.get_cells_mut(strm);
    if (ck.is_stored()) {
        const int32_t n_free = shape.kv_size - (int32_t) cells.get_used();
        return n_free + (int32_t) own_cells(seq_id).size() >= (int32_t) ck.rows.size();
    }
    for (size_t i = 0; i < ck.rows.size(); ++i) {
        const uint32_t row = (uint32_t) ck.rows[i];
        if (cells.is_empty(row) || !cells.seq_has(row, seq_id) || cells.pos_get(row) != ck.pos[i]) {
            return false;
        }
    }
    return true;
}

llama_pos elastic_cache::can_cut(llama_seq_id seq_id, llama_pos p0) const {
    check_seq_id(seq_id);
    const llama_pos end = kv.seq_pos_max(seq_id) + 1;  // 0 where the sequence is empty
    if (p0 >= end || !active()) {
        return std::min(p0, end);
    }
    const auto st = sequence(seq_id);
    if (p0 > st.pos_changed) {
        return p0;
    }
    llama_pos  res = 0;
    const auto it  = checkpoints.find(seq_id);
    if (it != checkpoints.end()) {
        for (const auto & ck : it->second) {
            if (ck.pos_end <= p0 && can_restore(seq_id, ck)) {
                res = std::max(res, ck.pos_end);
            }
        }
    }
    return res;
}

// free cells for the rows of a checkpoint: where they were, if nobody else is there by now
std::vector<int32_t> elastic_cache::place_rows(llama_seq_id seq_id, const checkpoint & ck) const {
    const auto &      cells = kv.get_cells_mut(kv.get_stream(seq_id));
    std::set<int32_t> taken;
    for (const int32_t row : ck.rows) {
        if (row < shape.kv_size && cells.is_empty(row)) {
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
        while (!cells.is_empty(next) || taken.count(next)) {
            ++next;
        }
        taken.insert(next);
        given.insert(next);
        res.push_back(next);
    }
    return res;
}

// the sequence becomes what it was at pos_end, for which there is a checkpoint that can be restored
void elastic_cache::restore(llama_seq_id seq_id, llama_pos pos_end) {
    ctx.memory_update(false);
    ctx.synchronize();

    auto & kept = checkpoints[seq_id];
    kept.erase(std::remove_if(kept.begin(), kept.end(), [&](const checkpoint & ck) { return ck.pos_end > pos_end; }), kept.end());
    auto & ck = kept.back();

    const uint32_t    strm  = kv.get_stream(seq_id);
    auto &            cells = kv.get_cells_mut(strm);
    std::set<int32_t> stays(ck.rows.begin(), ck.rows.end());
    if (ck.is_stored()) {
        // what another sequence uses too, if it still is what it was
        for (size_t i = 0; i < ck.rows.size(); ++i) {
            const int32_t row = ck.rows[i];
            if (row >= shape.kv_size || !is_shared(strm, row) || !cells.seq_has(row, seq_id) || cells.pos_get(row) != ck.pos[i]) {
                stays.erase(row);
            }
        }
        for (int32_t il = 0; il < shape.n_layer && !stays.empty(); ++il) {
            kv_layer_access layer(kv, shape, il, strm);
            layer.load_k();
            layer.load_v();
            const auto        rows = rows_of_layer(ck, il);
            std::set<int32_t> held;  // by the layer, now
            for (const int32_t row : stays) {
                if (!store->is_absent(strm, row, il)) {
                    held.insert(row);
                }
            }
            for (size_t j = 0; j < rows.size(); ++j) {
                const bool same = held.erase(rows[j]) > 0 && equals(layer.k, rows[j], ck.k[il], j, rows.size()) &&
                                  equals(layer.v, rows[j], ck.v[il], j, rows.size());
                if (!same) {
                    stays.erase(rows[j]);
                }
            }
            for (const int32_t row : held) {  // and not then
                stays.erase(row);
            }
        }
    }
    for (const int32_t cell : logical_cells(seq_id)) {
        if (!stays.count(cell) && cells.seq_rm(cell, seq_id)) {
            store->reset_cell(strm, cell, cell_kind::text);
        }
    }

    if (ck.is_stored()) {
        const auto before = ck.rows;
        ck.rows           = place_rows(seq_id, ck);
        for (size_t i = 0; i < ck.rows.size(); ++i) {
            if (stays.count(before[i])) {
                ck.rows[i] = before[i];
                continue;
            }
            cells.pos_set(ck.rows[i], ck.pos[i]);
            cells.ext_set(ck.rows[i], ck.ext[i]);
            cells.seq_add(ck.rows[i], seq_id);
            store->reset_cell(strm, ck.rows[i], ck.kinds[i]);
        }
        grow_v(false);
        note_touched(strm, *std::max_element(ck.rows.begin(), ck.rows.end()) + 1);
        for (int32_t il = 0; il < shape.n_layer; ++il) {
            kv_layer_access layer(kv, shape, il, strm);
            layer.load_k();
            layer.load_v();
            const auto rows = rows_of_layer(ck, il);
            write_bytes(layer.k, rows, ck.k[il]);
            write_bytes(layer.v, rows, ck.v[il]);
            layer.store();
        }
    }

    // what another sequence looks at too stays as it is
    std::vector<int32_t> own;
    std::vector<int32_t> own_rows;
    for (size_t i = 0; i < ck.rows.size(); ++i) {
        if (!is_shared(strm, ck.rows[i])) {
            own.push_back((int32_t) i);
            own_rows.push_back(ck.rows[i]);
            store->set_kind(strm, ck.rows[i], ck.kinds[i]);
        }
    }
    store->scatter_scores(strm, own_rows, pick(ck.scores, own));
    release_absent(strm, own_rows);

    seqs[seq_id] = ck.state;
    kv.set_head(strm, 0);
}

}  // namespace elastic
