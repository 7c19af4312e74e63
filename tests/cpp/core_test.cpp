// Every function of the core on small inputs and at the edges, for the sanitizers. Values are compared with
// independent oracles in the Python tests.

#include "check.h"
#include "core/biased_combiner.h"
#include "core/budget.h"
#include "core/coverage_selector.h"
#include "core/evict_cell.h"
#include "core/evict_per_head.h"
#include "core/generate.h"
#include "core/layer_shares.h"
#include "core/mean_combiner.h"
#include "core/merge.h"
#include "core/policy.h"
#include "core/sum_scorer.h"
#include "core/top_selector.h"
#include "core/window_scorer.h"
#include "kernels/attention_prefill.h"
#include "kernels/distances.h"
#include "kernels/kv_rows.h"
#include "kernels/parallel.h"
#include "kernels/simd.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>

using namespace elastic;

static std::mt19937 rng(42);

static float uniform(float lo, float hi) {
    return std::uniform_real_distribution<float>(lo, hi)(rng);
}

struct random_rows : row_source {
    int32_t            n_head_kv, n_cells, d;
    std::vector<float> data;

    random_rows(int32_t n_layer, int32_t n_head_kv, int32_t n_cells, int32_t d)
        : n_head_kv(n_head_kv), n_cells(n_cells), d(d), data((size_t) n_layer * n_head_kv * n_cells * d) {
        for (auto & x : data) {
            x = uniform(-1.0f, 1.0f);
        }
    }
    int32_t n_embd_head_k() const override { return d; }
    int32_t n_embd_head_v() const override { return d; }
    void    load_v(int32_t il, int32_t ih, float * dst) const override { load_k(il, ih, dst); }
    void    load_k(int32_t il, int32_t ih, float * dst) const override {
        const size_t n = (size_t) n_cells * d;
        std::memcpy(dst, data.data() + ((size_t) il * n_head_kv + ih) * n, n * sizeof(float));
    }
};

static cells make_cells(int32_t n) {
    cells c;
    for (int32_t i = 0; i < n; ++i) {
        c.kind.push_back(i >= n / 8 && i < n - n / 8 ? cell_kind::image : cell_kind::text);
    }
    c.pinned.assign(n, 0);
    return c;
}

static head_map make_map(int32_t n_layer, int32_t n_head_kv, int32_t n, float lo, float hi) {
    head_map m(n_layer, n_head_kv, n);
    for (auto & x : m.data) {
        x = uniform(lo, hi);
    }
    return m;
}

static void test_budget() {
    CHECK(budget::from_value(0.1).cells_for(10) == 1);
    CHECK(budget::from_value(0.07).cells_for(100) == 7);
    CHECK(budget::from_value(1e-12).cells_for(10) == 1);
    CHECK(budget::from_value(1.0).cells_for(INT32_MAX) == INT32_MAX);
    CHECK(budget::from_value(128).cells_for(64) == 64);
    for (const double bad : { 0.0, -1.0, 1.5, 3e9, std::nan(""), HUGE_VAL }) {
        CHECK_THROWS(budget::from_value(bad));
    }
    CHECK_THROWS(budget().cells_for(-1));
    CHECK_THROWS(budget().cells_for((int64_t) INT32_MAX + 1));
}

static void test_plans() {
    for (const auto & pol : policies()) {
        CHECK(&find_policy(pol.name) == &pol);
        for (const int32_t n : { 1, 2, 3, 8, 9, 64, 129 }) {
            for (const int32_t n_keep : { 1, 2, n / 3, n - 1, n }) {
                if (n_keep < 1 || n_keep > n) {
                    continue;
                }
                const cells          c = make_cells(n);
                const random_rows    rows(3, 2, n, 16);
                const importance_map importance = { make_map(3, 2, n, 0.0f, 1.0f), make_map(3, 2, n, 0.0f, 1.0f) };

                const plan p = make_plan(pol, { n_keep, 2 }, c, importance, &rows, 1);
                validate(p, c, sink_cells(pol.select, { pol.keeps_all() ? n : n_keep, 2 }));
                CHECK(pol.varies_layers() ? p.n_keep >= n_keep : p.n_keep == (pol.keeps_all() ? n : n_keep));
                const auto pos = rank_positions(p);
                CHECK(pos.back() == n - 1);

                const plan q = make_plan(pol, { n_keep, 2 }, c, importance, &rows, 4);
                CHECK(p.kept == q.kept && p.bucket == q.bucket);
            }
        }
    }
    CHECK_THROWS(find_policy("none of these"));

    const policy &    pol = find_policy("elastic");
    cells             c   = make_cells(16);
    const random_rows rows(1, 1, 16, 8);
    importance_map    importance = { make_map(1, 1, 16, 0.0f, 1.0f), make_map(1, 1, 16, 0.0f, 1.0f) };
    CHECK_THROWS(make_plan(pol, { 0, 1 }, c, importance, &rows));
    CHECK_THROWS(make_plan(pol, { 17, 1 }, c, importance, &rows));
    CHECK_THROWS(make_plan(pol, { 8, -1 }, c, importance, &rows));
    CHECK_THROWS(make_plan(pol, { 8, 1 }, c, importance, nullptr));
    CHECK_THROWS(make_plan(pol, { 8, 1 }, c, { head_map(1, 1, 15), {} }, &rows));
    CHECK_THROWS(make_plan(pol, { 1, 1 }, cells(), {}, &rows));
    importance.sum.data[3] = std::numeric_limits<float>::quiet_NaN();
    CHECK_THROWS(make_plan(pol, { 8, 1 }, c, importance, &rows));
    importance.sum.data[3] = 0.0f;

    c.pinned[4]  = 1;
    const plan p = make_plan(pol, { 8, 1 }, c, importance, &rows);
    validate(p, c, 1);
    CHECK(p.bucket[4] >= 0 && p.kept[p.bucket[4]] == 4);

    plan bad = p;
    std::swap(bad.kept[0], bad.kept[1]);
    CHECK_THROWS(validate(bad, c, 1));
    bad         = p;
    bad.kept[0] = -1;
    CHECK_THROWS(validate(bad, c, 1));
    bad = p;
    bad.bucket.pop_back();
    CHECK_THROWS(validate(bad, c, 1));

    c.pinned.assign(16, 1);
    CHECK_THROWS(make_plan(pol, { 8, 1 }, c, importance, &rows));

    const importance_map given = { make_map(2, 3, 5, 0.0f, 1.0f), {} };
    const cells          five  = make_cells(5);
    const score_view     view  = { five, given, nullptr, 1 };
    const head_map       layer = find_policy("elastic-paper").score->score(view);
    CHECK(layer.row(1, 0)[4] == layer.row(1, 2)[4]);
    CHECK(find_policy("local").score->score(view).row(1, 2)[4] == 4.0f);
}

static void test_layers() {
    CHECK((cells_of_layers(5, { 1.0f, 1.0f, 1.0f }, { 9, 9, 9 }) == std::vector<int32_t>{ 5, 5, 5 }));
    CHECK((cells_of_layers(4, { 1.0f, 3.0f }, { 9, 9 }) == std::vector<int32_t>{ 2, 6 }));
    CHECK((cells_of_layers(4, { 1.0f, 3.0f }, { 9, 4 }) == std::vector<int32_t>{ 4, 4 }));
    CHECK((cells_of_layers(9, { 1.0f, 1e9f }, { 3, 4 }) == std::vector<int32_t>{ 3, 4 }));
    CHECK((cells_of_layers(1, { 1.0f, 5.0f, 2.0f }, { 1, 0, 7 }) == std::vector<int32_t>{ 1, 0, 2 }));
    CHECK((cells_of_layers(0, { 1.0f, 2.0f }, { 3, 3 }) == std::vector<int32_t>{ 0, 0 }));

    const policy & pol = find_policy("elastic");
    for (const int32_t n : { 8, 33, 128 }) {
        for (const int32_t n_keep : { 2, n / 3, n - 1 }) {
            cells                c = make_cells(n);
            const random_rows    rows(3, 2, n, 16);
            const importance_map importance = { make_map(3, 2, n, 0.0f, 1.0f), make_map(3, 2, n, 0.0f, 1.0f) };
            for (const bool some_masked : { false, true }) {
                c.masked.assign(some_masked ? 3 * n : 0, 0);
                for (int32_t i = 2; some_masked && i < n - 1; i += 3) {
                    c.masked[i] = c.masked[n + i] = 1;  // the last layer holds all
                }
                const plan p = make_plan(pol, { n_keep, 2, { 1.0f, 4.0f, 0.5f } }, c, importance, &rows, 2);
                validate(p, c, sink_cells(pol.select, { n_keep, 2, {} }));
                int32_t n_total = 0;
                for (int32_t il = 0; il < 3; ++il) {
                    for (int32_t j = 0; j < p.n_keep; ++j) {
                        n_total += p.holds(il, j);
                    }
                }
                CHECK(n_total <= 3 * n_keep);
                CHECK(rank_positions(p).back() == n - 1);
            }
        }
    }
}

static void test_generate() {
    for (const auto & pol : policies()) {
        const evictor & rule = pol.generate;
        for (const int32_t n : { 0, 1, 2, 3, 40 }) {
            for (const int32_t n_sink : { -1, 0, 1, 50 }) {
                for (const int32_t n_prompt : { 0, 20, INT32_MAX }) {
                    for (const int32_t offset : { INT32_MIN, 0, 25, INT32_MAX }) {
                        cells         c = make_cells(n);
                        const int32_t i = cell_to_evict(rule, c, n_prompt, offset, n_sink, std::vector<float>(n));
                        CHECK(i >= -1 && i < std::max(n - 1, 0) + (i < 0));
                        CHECK(i < 0 || i >= n_sink);
                        c.pinned.assign(n, 1);
                        CHECK(cell_to_evict(rule, c, n_prompt, offset, n_sink, std::vector<float>(n)) == -1);
                    }
                }
            }
        }
    }
}

// what elastic evicts where nothing can be merged is what elastic-evict does
static void test_merging_answer() {
    const recompress_evictor recompress;
    const per_head_evictor   per_head;
    const int32_t            short_answer = per_head.short_answer;
    for (const int32_t n : { 0, 1, 2, 16, 17, 18, 40 }) {
        for (const int32_t n_sink : { -1, 0, 1, 50 }) {
            for (const int32_t n_said : { 0, short_answer, short_answer + 1 }) {
                cells c = make_cells(n);
                for (int32_t i = 0; i < std::min(n, n_said); ++i) {
                    c.kind[n - 1 - i] = cell_kind::generated;
                }
                std::vector<float> total(n);
                for (int32_t i = 0; i < n; i += 2) {
                    total[i] = HUGE_VALF;
                }
                const auto found = eviction_candidates(recompress, c, n_sink, total);
                CHECK(found == eviction_candidates(per_head, c, n_sink, total));
                CHECK(found.empty() == (n - per_head_recent <= std::max(n_sink, 0)));
                CHECK(found.empty() || (found.front() >= n_sink && found.back() < n - per_head_recent));
                c.pinned.assign(n, 1);
                CHECK(eviction_candidates(recompress, c, n_sink, total).empty());
            }
        }
    }
    for (const auto & pol : policies()) {
        CHECK(pol.overdraft() == (pol.name == "elastic" ? recompress.n_overdraft : 0));
        CHECK(pol.recompresses() == (pol.overdraft() > 0));
        CHECK(pol.overdraft() == 0 || (pol.evicts_per_head() && pol.generation_interval() == recompress.score_interval));
    }
}

// parts that fit together work together, and others are refused
static void test_compose() {
    const auto made = [](part<scorer> score, part<selector> select, part<combiner> combine, part<evictor> generate,
                         part<layer_budget> layers = make_part<uniform_layers>()) {
        return compose("made", "", score, layers, select, combine, generate);
    };
    const auto sums     = make_part<sum_scorer>();
    const auto top      = make_part<top_selector>();
    const auto coverage = make_part<coverage_selector>();
    const auto biased   = make_part<biased_combiner>();
    const auto lowest   = make_part<lowest_evictor>();
    const auto per_head = make_part<per_head_evictor>();
    const auto recency  = find_policy("local").score;

    CHECK_THROWS(made(recency, top, biased, lowest));
    CHECK_THROWS(made(recency, coverage, make_part<evict_combiner>(), per_head));
    CHECK_THROWS(made(sums, coverage, biased, lowest));
    CHECK_THROWS(made(sums, make_part<all_selector>(), make_part<evict_combiner>(), lowest));
    CHECK_THROWS(made(sums, make_part<all_selector>(), biased, make_part<keep_evictor>()));
    CHECK_THROWS(made(sums, part<selector>(), biased, lowest));
    CHECK_THROWS(find_policy("snapkv").needs() | find_policy("elastic").needs());

    const int32_t        n = 40, n_keep = 12;
    const cells          c = make_cells(n);
    const random_rows    rows(3, 2, n, 8);
    const importance_map importance = { make_map(3, 2, n, 0.0f, 1.0f), {} };
    for (const auto & combine : { part<combiner>(biased), part<combiner>(make_part<mean_combiner>()) }) {
        for (const auto & generate : { part<evictor>(lowest), part<evictor>(per_head) }) {
            for (const auto & select : { part<selector>(top), part<selector>(make_part<image_first_selector>()) }) {
                const policy pol = made(sums, select, combine, generate, make_part<measured_layers>());
                for (const auto & share : { std::vector<float>(), std::vector<float>{ 1.0f, 4.0f, 0.5f } }) {
                    const plan p = make_plan(pol, { n_keep, 1, share }, c, importance, &rows, 2);
                    validate(p, c, 1);
                    CHECK(std::count(p.bucket.begin(), p.bucket.end(), -1) == 0);  // all are merged
                    CHECK((p.n_keep == n_keep) == share.empty());
                    CHECK(p.weight.n_cells == (combine->weighs_scores() ? n : 0));
                }
            }
        }
    }
}

// layers of any policy keep as many cells as they are given, on average
static void test_shares() {
    const int32_t            n = 96, n_keep = 40;
    const cells              c = make_cells(n);
    const random_rows        rows(4, 2, n, 8);
    const std::vector<float> share = { 0.5f, 2.0f, 1.0f, 0.5f };
    for (const auto & pol : policies()) {
        const importance_map importance = { make_map(4, 2, n, 0.0f, 1.0f), make_map(4, 2, n, 0.0f, 1.0f) };
        if (pol.keeps_all()) {
            CHECK_THROWS(make_plan(pol, { n_keep, 1, share }, c, importance, &rows));
            continue;
        }
        const plan p = make_plan(pol, { n_keep, 1, share }, c, importance, &rows);
        validate(p, c, sink_cells(pol.select, { n_keep, 1, share }));
        std::vector<int32_t> held;
        for (int32_t il = 0; il < 4; ++il) {
            held.push_back((int32_t) std::count_if(p.kept_row(il, 0), p.kept_row(il, 0) + p.n_keep, [](int32_t i) { return i >= 0; }));
        }
        CHECK(std::accumulate(held.begin(), held.end(), 0) == 4 * n_keep);
        CHECK(held[1] > held[2] && held[2] > held[0] && std::abs(held[0] - held[3]) <= 1);
    }
}

// a scorer from outside is asked once, and what it gives is checked
static void test_external_scorer() {
    const int32_t        n = 12;
    const cells          c = make_cells(n);
    const random_rows    rows(2, 2, n, 8);
    const importance_map importance = { make_map(2, 2, n, 0.0f, 1.0f), make_map(2, 2, n, 0.0f, 1.0f) };
    int32_t              n_calls    = 0;
    head_map             given      = make_map(2, 2, n, -1.0f, 1.0f);
    const auto           score      = make_part<external_scorer>(
        [&](const score_view & v) {
            n_calls++;
            CHECK(v.n_cells() == n && v.rows == &rows);
            return given;
        },
        statistics());
    const policy top = with_scorer(find_policy("h2o"), score);
    validate(make_plan(top, { 5, 1 }, c, importance, &rows, 2), c, 1);
    CHECK(n_calls == 1);
    CHECK_THROWS(make_plan(with_scorer(find_policy("elastic"), score), { 5, 1 }, c, importance, &rows));  // negative weights
    given.data[3] = std::numeric_limits<float>::quiet_NaN();
    CHECK_THROWS(make_plan(top, { 5, 1 }, c, importance, &rows));
    given = head_map(2, 2, n - 1);
    CHECK_THROWS(make_plan(top, { 5, 1 }, c, importance, &rows));
}

// NaN wherever no cell lives, so that a stale read shows in what is kept
struct stream {
    std::vector<uint8_t> bytes;
    kv_rows              t;

    stream(ggml_type type, int32_t n_head_kv, int32_t d, int64_t n_rows, const std::vector<int32_t> & rows) {
        t.type        = type;
        t.n_head_kv   = n_head_kv;
        t.n_embd_head = d;
        t.n_rows      = n_rows;
        t.row_bytes   = (int64_t) ggml_row_size(type, (int64_t) n_head_kv * d);
        bytes.assign(n_rows * t.row_bytes, 0xFF);
        t.data = bytes.data();
        std::vector<float> x(rows.size() * d);
        for (int32_t ih = 0; ih < n_head_kv; ++ih) {
            for (auto & e : x) {
                e = uniform(-1.0f, 1.0f);
            }
            write_f32(t, rows, ih, x.data());
        }
    }
};

static void test_merge(ggml_type type_k, ggml_type type_v, int32_t n, int32_t n_keep, const char * name) {
    const int32_t n_layer = 2, n_head_kv = 2, d = 64, n_rows = n + 5;

    std::vector<int32_t> src;
    for (int32_t i = 0; i < n; ++i) {
        src.push_back(n_rows - 1 - i);  // logical order against the order of rows
    }
    std::vector<int32_t> dst(src.rbegin(), src.rbegin() + n_keep);

    stream            k(type_k, n_head_kv, d, n_rows, src);
    stream            v(type_v, n_head_kv, d, n_rows, src);
    const random_rows rows(n_layer, n_head_kv, n, d);
    const cells       c = make_cells(n);

    const policy &       pol        = find_policy(name);
    const combiner &     rule       = pol.combine;
    const importance_map importance = { make_map(n_layer, n_head_kv, n, 0.0f, 1.0f), make_map(n_layer, n_head_kv, n, 0.0f, 1.0f) };
    const plan           p          = make_plan(pol, { n_keep, 1 }, c, importance, &rows);

    const cell_state in = { make_map(n_layer, n_head_kv, n, 0.0f, 1.0f), head_map(n_layer, n_head_kv, n, 1.0f),
                            head_map(n_layer, n_head_kv, n) };
    cell_state out = { head_map(n_layer, n_head_kv, n_keep), head_map(n_layer, n_head_kv, n_keep), head_map(n_layer, n_head_kv, n_keep) };
    const int32_t        il     = 1;
    std::vector<uint8_t> before = k.bytes;

    std::vector<uint8_t> raw(n_keep * head_bytes(k.t)), moved(n_keep * head_bytes(k.t));
    std::vector<int32_t> from;
    for (int32_t j = 0; j < n_keep; ++j) {
        from.push_back(src[p.kept_row(il, 0)[j]]);
    }
    read_raw(k.t, from, 0, raw.data());

    merge_layer(p, rule, il, k.t, v.t, src, dst, in, out);

    read_raw(k.t, dst, 0, moved.data());
    // rows that only move keep their bytes
    const bool moves_keys =
        rule.how() == merging::mean || std::any_of(p.key_weight.begin(), p.key_weight.end(), [](float x) { return x > 0.0f; });
    CHECK(moves_keys || raw == moved);
    for (int32_t j = 0; j < n_keep; ++j) {
        const size_t bytes = head_bytes(k.t);
        const auto   n_in  = std::count(p.bucket_row(il, 0), p.bucket_row(il, 0) + n, j);
        CHECK(n_in > 1 || std::memcmp(raw.data() + j * bytes, moved.data() + j * bytes, bytes) == 0);
    }
    CHECK(std::memcmp(before.data(), k.bytes.data(), 5 * k.t.row_bytes) == 0);  // rows of no cell

    std::vector<float> x(n_keep * d);
    for (int32_t ih = 0; ih < n_head_kv; ++ih) {
        for (const kv_rows * t : { &k.t, &v.t }) {
            read_f32(*t, dst, ih, x.data());
            for (const float e : x) {
                CHECK(std::fabs(e) < 1.2f);  // false for NaN
            }
        }
        double importance = 0.0, joined = 0.0;
        for (int32_t j = 0; j < n_keep; ++j) {
            importance += out.importance.row(il, ih)[j];
            CHECK(out.count.row(il, ih)[j] >= 1.0f && out.bias.row(il, ih)[j] >= 0.0f);
        }
        for (int32_t i = 0; i < n; ++i) {
            joined += p.bucket_row(il, ih)[i] >= 0 ? in.importance.row(il, ih)[i] : 0.0f;
        }
        CHECK(std::fabs(importance - joined) < 1e-4 * (1.0 + joined));
    }

    std::vector<int32_t> outside(src);
    outside[0] = n_rows;
    CHECK_THROWS(merge_layer(p, rule, il, k.t, v.t, outside, dst, in, out));
    outside.pop_back();
    CHECK_THROWS(merge_layer(p, rule, il, k.t, v.t, outside, dst, in, out));
}

static void test_merges() {
    const ggml_type types[] = { GGML_TYPE_F32,  GGML_TYPE_F16,  GGML_TYPE_BF16, GGML_TYPE_Q8_0,  GGML_TYPE_Q5_0,
                                GGML_TYPE_Q5_1, GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_IQ4_NL };
    for (const auto type : types) {
        CHECK(rows_supported(type));
        for (const char * rule : { "elastic-evict", "elastic-paper", "elastic" }) {
            for (const int32_t n : { 1, 2, 24 }) {
                for (const int32_t n_keep : { 1, n / 2, n }) {
                    if (n_keep >= 1) {
                        test_merge(type, type, n, n_keep, rule);
                    }
                }
            }
        }
    }
    test_merge(GGML_TYPE_Q8_0, GGML_TYPE_F16, 24, 9, "elastic");
    CHECK(!rows_supported(GGML_TYPE_Q2_K));
}

// the bits of ggml's own conversion, of all halves
static void test_halves() {
    const auto same = [](float x, float y) {
        return std::memcmp(&x, &y, sizeof(x)) == 0;
    };
    for (uint32_t first = 0; first < 0x10000; first += N_SIMD) {
        uint16_t halves[N_SIMD];
        float    floats[N_SIMD];
        std::iota(halves, halves + N_SIMD, (uint16_t) first);
        store(floats, load(halves));
        for (int32_t i = 0; i < N_SIMD; ++i) {
            const float expected = ggml_fp16_to_fp32(halves[i]);
            CHECK(std::isnan(expected) ? std::isnan(floats[i]) && std::isnan(f16_to_f32(halves[i]))
                                       : same(floats[i], expected) && same(f16_to_f32(halves[i]), expected));
        }
    }
}

// the bits of ggml's own conversions of blocks
static void test_blocks() {
    const int32_t n = 320;
    for (const auto type : { GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        std::vector<float>   x(n), read(n), expected(n);
        std::vector<uint8_t> bytes(ggml_row_size(type, n));
        for (auto & e : x) {
            e = uniform(-3.0f, 3.0f);
        }
        ggml_get_type_traits(type)->from_float_ref(x.data(), bytes.data(), n);
        ggml_get_type_traits(type)->to_float(bytes.data(), expected.data(), n);
        to_f32(type, bytes.data(), read.data(), n);
        CHECK(read == expected);
    }
}

// the quick bounds are below the distances, and not by much; a few channels are far larger than the others
static void test_bounds() {
    const int32_t n = 200, d = 40;

    std::vector<float>   k, v;
    std::vector<int32_t> cells, anchors;
    for (int32_t i = 0; i < n; ++i) {
        cells.push_back(i);
        for (int32_t e = 0; e < d; ++e) {
            k.push_back(uniform(-1.0f, 1.0f) * (e % 8 == 0 ? 30.0f : 1.0f));
            v.push_back(i % 10 == 0 ? 0.0f : uniform(0.0f, 1.0f));
        }
    }
    kv_points f;
    f.fill(cells, k, d, v, d);
    for (int32_t r = 0; r < N_ANCHORS - 1; ++r) {
        anchors.push_back(7 * r);
    }
    anchor_block block;
    block.set(f, anchors.data(), (int32_t) anchors.size());

    for (int32_t first = 0; first < n; first += N_CELLS - 1) {
        const int32_t n_here = std::min(n - first, N_CELLS - 1);

        float bounds[N_CELLS][N_ANCHORS], than[N_CELLS];
        bool  any[N_CELLS];
        for (int32_t q = 0; q < n_here; ++q) {
            than[q] = uniform(0.0f, 3.0f);
        }
        block.bound(f, cells.data() + first, n_here, than, bounds, any);
        for (int32_t q = 0; q < n_here; ++q) {
            float least = HUGE_VALF;
            for (size_t r = 0; r < anchors.size(); ++r) {
                const float distance = f.distance(first + q, anchors[r]);
                CHECK(bounds[q][r] <= distance && bounds[q][r] > distance - (kv_points::by_bytes() ? 0.2f : 1e-3f));
                least = std::min(least, bounds[q][r]);
            }
            CHECK(bounds[q][N_ANCHORS - 1] > 1e30f);
            CHECK(any[q] == (least < than[q]));
        }
    }
}

// against the same in f64, number by number
static void test_attention(ggml_type type_k, ggml_type type_v, int32_t n_q, int32_t n_kv, bool with_bias, float soft_cap = 0.0f,
                           bool with_sinks = false) {
    const int32_t n_head = 4, n_head_kv = 2, d_k = 32, d_v = 40, n_rows = n_kv + 3, n_sums = 2;

    const auto random = [](size_t n, float scale) {
        std::vector<float> res(n);
        for (auto & x : res) {
            x = uniform(-scale, scale);
        }
        return res;
    };
    std::vector<int32_t> all(n_kv);
    std::iota(all.begin(), all.end(), 0);
    std::vector<uint8_t> k_data(ggml_row_size(type_k, d_k * n_head_kv) * n_rows), v_data(ggml_row_size(type_v, d_v * n_head_kv) * n_rows);

    attention a;
    a.n_q    = n_q;
    a.n_kv   = n_kv;
    a.n_head = n_head;
    a.k      = { type_k, k_data.data(), n_head_kv, d_k, n_rows, (int64_t) ggml_row_size(type_k, d_k * n_head_kv) };
    a.v      = { type_v, v_data.data(), n_head_kv, d_v, n_rows, (int64_t) ggml_row_size(type_v, d_v * n_head_kv) };
    for (int32_t ih = 0; ih < n_head_kv; ++ih) {
        write_f32(a.k, all, ih, random((size_t) n_kv * d_k, 1.0f).data());
        write_f32(a.v, all, ih, random((size_t) n_kv * d_v, 1.0f).data());
    }
    const auto q       = random((size_t) n_q * n_head * d_k, 3.0f);
    const auto weights = random((size_t) n_q * n_sums, 1.0f);
    const auto bias    = random((size_t) n_head_kv * n_rows, 1.0f);
    const auto sinks   = random(n_head, 4.0f);

    // causal, but for cells that nobody sees and a query that sees nothing
    const auto sees = [&](int32_t i, int32_t c) {
        return c <= n_kv - n_q + i && c % 7 != 5 && (c < 40 || c >= 110) && i != n_q / 2;
    };
    std::vector<float>       mask;
    std::vector<ggml_fp16_t> mask16;
    for (int32_t i = 0; i < n_q; ++i) {
        for (int32_t c = 0; c < n_rows; ++c) {
            mask.push_back(sees(i, c) ? 0.0f : -INFINITY);
            mask16.push_back(ggml_fp32_to_fp16(mask.back()));
        }
    }
    std::vector<float> out((size_t) n_q * n_head * d_v, NAN), sums((size_t) n_head * n_sums * n_kv, NAN);

    a.q             = q.data();
    a.q_stride      = n_head * d_k;
    a.q_stride_head = d_k;
    a.scale         = 0.5f;
    a.mask          = with_bias ? (const void *) mask16.data() : mask.data();
    a.mask_type     = with_bias ? GGML_TYPE_F16 : GGML_TYPE_F32;
    a.mask_stride   = n_rows;
    a.bias          = with_bias ? bias.data() : nullptr;
    a.bias_stride   = n_rows;
    a.soft_cap      = soft_cap;
    a.sinks         = with_sinks ? sinks.data() : nullptr;
    a.weights       = weights.data();
    a.n_sums        = n_sums;
    a.out           = out.data();
    a.sums          = sums.data();
    attend(a, 0, 1);
    attend(a, 1, n_head);

    std::vector<float> k((size_t) n_kv * d_k), v((size_t) n_kv * d_v);
    for (int32_t h = 0; h < n_head; ++h) {
        read_f32(a.k, all, h / 2, k.data());
        read_f32(a.v, all, h / 2, v.data());
        std::vector<double> expected((size_t) n_sums * n_kv, 0.0);
        for (int32_t i = 0; i < n_q; ++i) {
            std::vector<double> w(n_kv, 0.0);
            double              sum = with_sinks ? std::exp((double) sinks[h]) : 0.0;
            for (int32_t c = 0; c < n_kv; ++c) {
                double x = 0.0;
                for (int32_t e = 0; e < d_k; ++e) {
                    x += (double) q[((size_t) i * n_head + h) * d_k + e] * k[(size_t) c * d_k + e];
                }
                x *= 0.5;
                x    = (soft_cap > 0.0f ? soft_cap * std::tanh(x / soft_cap) : x) + (with_bias ? bias[(size_t) (h / 2) * n_rows + c] : 0.0);
                w[c] = sees(i, c) ? std::exp(x) : 0.0;
                sum += w[c];
            }
            for (int32_t e = 0; e < d_v; ++e) {
                double x = 0.0;
                for (int32_t c = 0; c < n_kv; ++c) {
                    x += sum > 0.0 ? w[c] / sum * v[(size_t) c * d_v + e] : 0.0;
                }
                CHECK(std::fabs(out[((size_t) i * n_head + h) * d_v + e] - x) < 2e-6);
            }
            for (int32_t c = 0; c < n_kv && sum > 0.0; ++c) {
                for (int32_t r = 0; r < n_sums; ++r) {
                    expected[(size_t) r * n_kv + c] += w[c] / sum * weights[(size_t) i * n_sums + r];
                }
            }
        }
        for (size_t j = 0; j < expected.size(); ++j) {
            CHECK(std::fabs(sums[(size_t) h * n_sums * n_kv + j] - expected[j]) < 1e-5);
        }
    }
}

static void test_attentions() {
    for (const bool with_bias : { false, true }) {
        for (const int32_t n_q : { 1, 7, 20, 64, 150 }) {
            test_attention(GGML_TYPE_F16, GGML_TYPE_F16, n_q, 203, with_bias);
            test_attention(GGML_TYPE_F32, GGML_TYPE_F32, n_q, 150, with_bias);
            test_attention(GGML_TYPE_Q8_0, GGML_TYPE_BF16, n_q, 203, with_bias);
            test_attention(GGML_TYPE_F32, GGML_TYPE_F16, n_q, 203, with_bias, 3.0f);
            test_attention(GGML_TYPE_F32, GGML_TYPE_F32, n_q, 203, with_bias, 0.0f, true);
            test_attention(GGML_TYPE_F16, GGML_TYPE_F16, n_q, 150, with_bias, 20.0f, true);
        }
    }
}

static void test_parallel() {
    for (const int32_t n_threads : { -1, 1, 3, 100 }) {
        std::vector<int> hits(17, 0);
        parallel_for(17, n_threads, [&](int32_t i) { hits[i]++; });
        for (const int h : hits) {
            CHECK(h == 1);
        }
        parallel_for(0, n_threads, [&](int32_t) { CHECK(false); });
        CHECK_THROWS(parallel_for(17, n_threads, [&](int32_t i) {
            if (i == 5) {
                throw error("five");
            }
        }));
    }
}

static double now_ms() {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// plan and merge of all layers at LLaVA-1.5-7B's shape, f16, one thread: median of 5 with the least and the most.
// Four layers' rows take turns, more than the caches hold.
static void bench(const char * name, int32_t n, int32_t n_keep) {
    const int32_t n_layer = 32, n_head_kv = 32, d = 128, n_stream = 4, n_text = 32;

    const policy &       pol = find_policy(name);
    std::vector<int32_t> src;
    cells                c;
    for (int32_t i = 0; i < n; ++i) {
        src.push_back(i);
        c.kind.push_back(i >= n_text && i < n - n_text ? cell_kind::image : cell_kind::text);
    }
    c.pinned.assign(n, 0);
    const std::vector<int32_t> dst(src.begin(), src.begin() + n_keep);

    std::vector<stream> k, v;
    for (int32_t i = 0; i < n_stream; ++i) {
        k.emplace_back(GGML_TYPE_F16, n_head_kv, d, n, src);
        v.emplace_back(GGML_TYPE_F16, n_head_kv, d, n, src);
    }
    struct stream_rows : row_source {
        const std::vector<stream> &  k;
        const std::vector<stream> &  v;
        const std::vector<int32_t> & rows;
        stream_rows(const std::vector<stream> & k, const std::vector<stream> & v, const std::vector<int32_t> & rows)
            : k(k), v(v), rows(rows) {}
        int32_t n_embd_head_k() const override { return k[0].t.n_embd_head; }
        int32_t n_embd_head_v() const override { return v[0].t.n_embd_head; }
        void    load_k(int32_t il, int32_t ih, float * dst) const override { read_f32(k[il % k.size()].t, rows, ih, dst); }
        void    load_v(int32_t il, int32_t ih, float * dst) const override { read_f32(v[il % v.size()].t, rows, ih, dst); }
    };
    const stream_rows rows(k, v, src);
    const cell_state  in = { make_map(n_layer, n_head_kv, n, 0.0f, 1.0f), head_map(n_layer, n_head_kv, n, 1.0f),
                             head_map(n_layer, n_head_kv, n) };
    cell_state out = { head_map(n_layer, n_head_kv, n_keep), head_map(n_layer, n_head_kv, n_keep), head_map(n_layer, n_head_kv, n_keep) };

    std::vector<double> t_plan, t_merge;
    for (int i = 0; i < 5; ++i) {
        const double t0 = now_ms();
        const plan   p  = make_plan(pol, { n_keep, 1 }, c, { in.importance, in.importance }, &rows, 1);
        const double t1 = now_ms();
        for (int32_t il = 0; il < n_layer; ++il) {
            merge_layer(p, pol.combine, il, k[il % n_stream].t, v[il % n_stream].t, src, dst, in, out);
        }
        t_plan.push_back(t1 - t0);
        t_merge.push_back(now_ms() - t1);
    }
    std::sort(t_plan.begin(), t_plan.end());
    std::sort(t_merge.begin(), t_merge.end());
    printf("%4d -> %3d  %-14s  plan %7.1f ms (%.1f - %.1f)  merge %7.1f ms (%.1f - %.1f)\n", n, n_keep, name, t_plan[2], t_plan[0],
           t_plan[4], t_merge[2], t_merge[0], t_merge[4]);
}

// core_test --bench: milliseconds instead of tests
int main(int argc, char ** argv) {
    if (argc > 1 && std::strcmp(argv[1], "--bench") == 0) {
        for (const char * name : { "elastic-evict", "elastic-paper", "elastic" }) {
            bench(name, 640, 128);
            bench(name, 2944, 589);
        }
        return 0;
    }
    test_budget();
    test_plans();
    test_layers();
    test_generate();
    test_merging_answer();
    test_compose();
    test_shares();
    test_external_scorer();
    test_merges();
    test_halves();
    test_blocks();
    test_bounds();
    test_attentions();
    test_parallel();
    printf("%s: %d failed checks\n", n_failed ? "FAILED" : "ok", n_failed);
    return n_failed ? 1 : 0;
}
