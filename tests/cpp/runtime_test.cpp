// The parts of the runtime that need no model: stages of sequences, importance, and what else is known of cells.

#include "check.h"
#include "runtime/cell_table.h"
#include "runtime/importance.h"
#include "runtime/packed_map.h"
#include "runtime/query_windows.h"
#include "runtime/sequence_table.h"

#include <cstdio>
#include <cstring>
#include <set>

using namespace elastic;

// a batch of tokens of single sequences
struct tokens {
    std::vector<llama_pos>                 pos;
    std::vector<int32_t>                   n_seq_id;
    std::vector<std::vector<llama_seq_id>> ids;
    std::vector<llama_seq_id *>            id_ptrs;
    std::vector<int8_t>                    logits;

    tokens & add(llama_pos p, llama_seq_id seq_id, bool wants_logits) {
        pos.push_back(p);
        n_seq_id.push_back(1);
        ids.push_back({ seq_id });
        logits.push_back(wants_logits);
        return *this;
    }

    llama_batch batch() {
        id_ptrs.clear();
        for (auto & id : ids) {
            id_ptrs.push_back(id.data());
        }
        llama_batch res = {};
        res.n_tokens    = (int32_t) pos.size();
        res.pos         = pos.data();
        res.n_seq_id    = n_seq_id.data();
        res.seq_id      = id_ptrs.data();
        res.logits      = logits.data();
        return res;
    }
};

// decodes a batch: every token gets a cell
static std::vector<batch_part> decode(sequence_table & seqs, std::map<llama_seq_id, int32_t> & n_cells, tokens t) {
    const auto parts = seqs.begin_batch(t.batch(), [&](llama_seq_id id) { return n_cells[id] == 0; });
    for (const auto & part : parts) {
        if (!part.is_prompt) {
            seqs.begin_token(part.seq_id);
        }
    }
    for (size_t i = 0; i < t.pos.size(); ++i) {
        seqs.add_token(t.ids[i][0], t.pos[i], ++n_cells[t.ids[i][0]], t.logits[i] != 0);
    }
    return parts;
}

static tokens prompt(llama_pos first, int32_t n, llama_seq_id seq_id) {
    tokens res;
    for (int32_t i = 0; i < n; ++i) {
        res.add(first + i, seq_id, i + 1 == n);
    }
    return res;
}

static void test_stages() {
    sequence_table                  seqs(4);
    std::map<llama_seq_id, int32_t> n_cells;

    auto parts = decode(seqs, n_cells, prompt(0, 5, 0));
    CHECK(parts.size() == 1 && parts[0].is_prompt && parts[0].n_tokens == 5 && parts[0].pos_min == 0);
    CHECK(seqs.is_prompt(0) && seqs.is_scored(0));
    CHECK(seqs.get(0).n_tokens == 5 && seqs.get(0).pos_prompt == 4 && seqs.get(0).pending);

    // the first token that is alone in its batch, wants logits and has a new position
    seqs.at(0).pending = false;
    parts              = decode(seqs, n_cells, tokens().add(5, 0, true));
    CHECK(!parts[0].is_prompt && !seqs.is_prompt(0) && !seqs.is_scored(0));
    parts = decode(seqs, n_cells, tokens().add(6, 0, false));
    CHECK(parts[0].is_prompt);  // wants no logits

    // a sequence whose cells are gone begins anew, with a prompt of one token
    n_cells[0] = 0;
    parts      = decode(seqs, n_cells, tokens().add(0, 0, true));
    CHECK(parts[0].is_prompt && seqs.get(0).n_tokens == 1);

    // its logits were not asked for, so nobody has chosen what follows
    parts = decode(seqs, n_cells, tokens().add(1, 0, false));
    parts = decode(seqs, n_cells, tokens().add(2, 0, true));
    CHECK(parts[0].is_prompt && seqs.get(0).pos_prompt == 2);
    parts = decode(seqs, n_cells, tokens().add(3, 0, true));
    CHECK(!parts[0].is_prompt && seqs.get(0).pos_prompt == 2);

    seqs.set_prefill(true);
    parts = decode(seqs, n_cells, tokens().add(4, 0, true));
    CHECK(parts[0].is_prompt && seqs.get(0).pos_prompt == 4);
}

static void test_scored_steps() {
    sequence_table                  seqs(3);
    std::map<llama_seq_id, int32_t> n_cells;
    decode(seqs, n_cells, prompt(0, 4, 0));
    seqs.at(0).pending = false;

    std::set<llama_pos> scored;
    for (llama_pos pos = 4; pos < 13; ++pos) {
        decode(seqs, n_cells, tokens().add(pos, 0, true));
        if (seqs.is_scored(0)) {
            CHECK(seqs.query_count(0) == 3);  // it stands for those since the last one
            seqs.scored(0, pos);
            scored.insert(pos);
        }
    }
    CHECK((scored == std::set<llama_pos>{ 6, 9, 12 }));
    CHECK(seqs.get(0).pos_changed == 12 && seqs.get(0).pos_moved == -1);

    // two answers in the same batches, each by its own steps
    sequence_table both(3);
    n_cells.clear();
    decode(both, n_cells, prompt(0, 4, 0));
    decode(both, n_cells, prompt(0, 5, 1));
    both.at(0).pending = both.at(1).pending = false;
    decode(both, n_cells, tokens().add(4, 0, true));  // the first is a token ahead
    std::map<llama_seq_id, std::set<llama_pos>> of;
    for (llama_pos pos = 5; pos < 13; ++pos) {
        decode(both, n_cells, tokens().add(pos, 0, true).add(pos, 1, true));
        for (const llama_seq_id id : { 0, 1 }) {
            if (both.is_scored(id)) {
                CHECK(both.query_count(id) == 3);
                both.scored(id, pos);
                of[id].insert(pos);
            }
        }
    }
    CHECK((of[0] == std::set<llama_pos>{ 6, 9, 12 }));
    CHECK((of[1] == std::set<llama_pos>{ 7, 10 }));

    sequence_table never(0);
    decode(never, n_cells, prompt(0, 4, 1));
    never.at(1).pending = false;
    for (llama_pos pos = 4; pos < 8; ++pos) {
        decode(never, n_cells, tokens().add(pos, 1, true));
        CHECK(!never.is_scored(1));
    }
}

static void test_cuts() {
    sequence_table                  seqs(0);
    std::map<llama_seq_id, int32_t> n_cells;
    decode(seqs, n_cells, prompt(0, 10, 0));
    seqs.at(0).pending = false;
    decode(seqs, n_cells, tokens().add(10, 0, true));
    decode(seqs, n_cells, tokens().add(11, 0, true));

    seqs.cut(0, 11, INT32_MAX, 1, 11);  // of the answer
    CHECK(seqs.get(0).n_tokens == 11 && seqs.get(0).pos_prompt == 9 && !seqs.get(0).pending);
    seqs.cut(0, 6, INT32_MAX, 5, 6);  // and of the prompt, whose rest waits
    CHECK(seqs.get(0).n_tokens == 6 && seqs.get(0).pos_prompt == 5 && seqs.get(0).pending && seqs.get(0).n_prompt_cells == 6);

    seqs.note_change(0, 4, true);
    seqs.note_change(0, 3, false);
    CHECK(seqs.get(0).pos_changed == 4 && seqs.get(0).pos_moved == 4);
    seqs.shift(0, 4, 6, -2);
    CHECK(seqs.get(0).pos_prompt == 3 && seqs.get(0).pos_moved == 2);
    seqs.shift(7, 0, 9, 1);  // of no sequence
    CHECK(seqs.ids() == std::vector<llama_seq_id>{ 0 });
}

static importance make_importance(const importance_needs & needs) {
    return importance(2, 3, 16, 2, needs);
}

static void test_importance() {
    importance scores = make_importance({ true, 0.5f });
    CHECK(scores.has_any() && scores.has_decayed());
    for (int32_t il = 0; il < 2; ++il) {
        for (int32_t ih = 0; ih < 3; ++ih) {
            for (int32_t i = 0; i < 16; ++i) {
                scores.sum_row(1, il, ih)[i]     = (float) (100 * il + 10 * ih + i);
                scores.decayed_row(1, il, ih)[i] = 8.0f;
            }
        }
    }
    const std::vector<int32_t> rows = { 5, 2, 9 };
    auto                       got  = scores.gather(1, rows);
    CHECK(got.sum.n_cells == 3 && got.sum.row(1, 2)[0] == 125.0f && got.sum.row(1, 2)[1] == 122.0f);
    CHECK(scores.gather(0, rows).sum.row(1, 2)[0] == 0.0f);  // another stream

    scores.decay(1, { 1.0f, 1.0f, 0.25f });
    CHECK(scores.decayed_row(1, 0, 0)[2] == 2.0f && scores.decayed_row(1, 0, 0)[3] == 8.0f);

    const auto total = scores.total(1, { 0, 1 });
    CHECK(total[0] == 360.0f && total[1] == 366.0f);

    scores.move_head(1, 9, 5, 1, 2);
    CHECK(scores.sum_row(1, 1, 2)[5] == 129.0f && scores.sum_row(1, 1, 1)[5] == 115.0f);
    scores.reset_cell(1, 5, 1);
    CHECK(scores.sum_row(1, 1, 2)[5] == 0.0f && scores.sum_row(1, 0, 2)[5] == 25.0f);
    scores.reset_cell(1, 5);
    CHECK(scores.sum_row(1, 0, 2)[5] == 0.0f);

    scores.copy_stream(1, 0, 4);
    CHECK(scores.sum_row(0, 1, 0)[3] == 103.0f && scores.sum_row(0, 1, 0)[4] == 0.0f);
    scores.reset();
    CHECK(scores.total(1, { 0, 1, 2 }) == std::vector<float>(3, 0.0f));
}

// the last queries of each sequence, saved and loaded, and shared by copies
static void test_windows() {
    const float   paid[] = { 1.0f, 2.0f, 4.0f };
    query_windows windows(2, 3, 16, 2);
    for (const float x : paid) {
        windows.begin_query(0);
        windows.row(0, 0, 1, 2)[4] = x;
        windows.begin_query(5);  // another sequence's
    }
    CHECK(windows.any() && windows.row(0, 0, 1, 2)[4] == 4.0f && windows.row(0, 1, 1, 2)[4] == 2.0f);
    CHECK(windows.sum(0, { 3, 4 }).row(1, 2)[1] == 6.0f && windows.sum(0, { 3, 4 }).row(1, 1)[1] == 0.0f);
    CHECK(windows.sum(5, { 4 }).row(1, 2)[0] == 0.0f && windows.sum(9, { 4 }).row(1, 2)[0] == 0.0f);

    query_windows loaded(2, 3, 16, 2);
    loaded.set(7, { 11 }, windows.gather(0, { 4 }));
    CHECK(loaded.row(7, 0, 1, 2)[11] == 4.0f && loaded.row(7, 1, 1, 2)[11] == 2.0f);
    loaded.begin_query(7);
    CHECK(loaded.sum(7, { 11 }).row(1, 2)[0] == 4.0f);

    windows.copy(0, 1);
    windows.begin_query(1);
    CHECK(windows.sum(0, { 4 }).row(1, 2)[0] == 6.0f && windows.sum(1, { 4 }).row(1, 2)[0] == 4.0f);
    windows.reset_cell(0, 4);
    CHECK(windows.sum(0, { 4 }).row(1, 2)[0] == 0.0f);
    windows.forget(1);
    CHECK(windows.gather(1, { 4 }).empty());

    CHECK(!query_windows(2, 3, 16, 0).any() && query_windows(2, 3, 16, 0).sum(0, { 4 }).n_cells == 0);
}

static void test_nothing_kept() {
    importance scores = make_importance({});
    CHECK(!scores.has_any() && scores.sum_row(0, 0, 0) == nullptr && scores.decayed_row(0, 0, 0) == nullptr);
    scores.reset_cell(0, 3);
    scores.move_head(0, 1, 2, 0, 0);
    scores.copy_stream(0, 1, 16);
    const auto got = scores.gather(0, { 1, 2 });
    CHECK(got.sum.n_cells == 2 && got.decayed.n_cells == 0);
    scores.scatter(0, { 1, 2 }, got);
    CHECK(scores.total(0, { 1 })[0] == 0.0f);
}

static void test_cell_table() {
    cell_table table(2, 2, 8, 2, true);
    CHECK(table.counts(0, { 1 }).row(1, 1)[0] == 1.0f);
    head_map counts(2, 2, 2, 3.0f);
    table.set_counts(0, { 1, 4 }, counts);
    table.set_rank_scores(0, { 1, 4 }, { 0.5f, 0.25f });
    table.set_kind(0, 4, cell_kind::image);
    CHECK(table.counts(0, { 4 }).row(0, 1)[0] == 3.0f && table.rank_score(0, 4) == 0.25f);
    table.move_head(0, 4, 2, 0, 1);
    CHECK(table.counts(0, { 2 }).row(0, 1)[0] == 3.0f && table.counts(0, { 2 }).row(0, 0)[0] == 1.0f);
    table.copy_stream(0, 1, 8);
    CHECK(table.kind(1, 4) == cell_kind::image && table.counts(1, { 1 }).row(1, 0)[0] == 3.0f);
    table.reset_cell(0, 4, cell_kind::text);
    CHECK(table.kind(0, 4) == cell_kind::text && table.rank_score(0, 4) == HUGE_VALF && table.counts(0, { 4 }).row(1, 1)[0] == 1.0f);
    table.reset();
    CHECK(table.rank_score(1, 1) == HUGE_VALF && table.counts(1, { 1 }).row(1, 0)[0] == 1.0f);

    cell_table plain(2, 2, 8, 1, false);
    plain.set_counts(0, { 1 }, head_map(2, 2, 1, 9.0f));
    CHECK(!plain.has_counts() && plain.counts(0, { 1 }).row(0, 0)[0] == 1.0f);
}

static bool same_bits(const head_map & a, const head_map & b) {
    return a.n_layer == b.n_layer && a.n_head_kv == b.n_head_kv && a.n_cells == b.n_cells && a.data.size() == b.data.size() &&
           (a.data.empty() || std::memcmp(a.data.data(), b.data.data(), a.data.size() * sizeof(float)) == 0);
}

static void test_packed_map() {
    const std::vector<bool> masked = { false, true, true, false, false, true };  // 2 layers of 3 cells
    head_map                m(2, 2, 3);
    for (size_t i = 0; i < m.data.size(); ++i) {
        m.data[i] = masked[i / 6 * 3 + i % 3] ? -HUGE_VALF : 0.5f * i;
    }
    CHECK(same_bits(packed_map(m, masked).unpack(masked), m) && packed_map(m, masked).n_bytes() == 6 * 4);
    CHECK(same_bits(packed_map(m, {}).unpack({}), m) && packed_map(m, {}).n_bytes() == 12 * 4);

    head_map ones(2, 2, 3, 1.0f);  // the same in all
    CHECK(same_bits(packed_map(ones, masked).unpack(masked), ones) && packed_map(ones, masked).n_bytes() == 0);

    m.data[1] = -0.0f;  // masked, and not as the others
    CHECK(same_bits(packed_map(m, masked).unpack(masked), m) && packed_map(m, masked).n_bytes() == 12 * 4);
    head_map zeros(1, 1, 2);
    zeros.data[1] = -0.0f;
    CHECK(same_bits(packed_map(zeros, {}).unpack({}), zeros));

    CHECK(same_bits(packed_map({}, masked).unpack(masked), {}) && packed_map().n_bytes() == 0);
    CHECK(same_bits(packed_map(ones, std::vector<bool>(6, true)).unpack(std::vector<bool>(6, true)), ones));
}

int main() {
    test_stages();
    test_scored_steps();
    test_cuts();
    test_importance();
    test_windows();
    test_nothing_kept();
    test_cell_table();
    test_packed_map();
    if (n_failed) {
        fprintf(stderr, "%d checks failed\n", n_failed);
        return 1;
    }
    printf("all checks passed\n");
    return 0;
}
