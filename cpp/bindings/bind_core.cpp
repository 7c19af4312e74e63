// _core.core: the pure functions, for tests and inspection.

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "bindings/python_scorer.h"
#include "core/budget.h"
#include "core/generate.h"
#include "core/kind_split.h"
#include "core/merge.h"
#include "core/policy.h"
#include "kernels/kv_rows.h"

#include <pybind11/stl.h>

#include <algorithm>

#include <numeric>
#include <optional>
#include <utility>

namespace py = pybind11;

using namespace pybind11::literals;

namespace elastic {

using i32_array = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

// A part that some policy has, by its name; `of` takes it from a policy.
template <typename F> static auto find_part(const std::string & name, F of) {
    for (const auto & p : policies()) {
        if (of(p)->name() == name) {
            return of(p);
        }
    }
    throw error("[rule] got \"" + name + "\", which is no rule of its kind");
}

static part<evictor> evictor_from(const std::string & name) {
    return find_part(name, [](const policy & p) { return p.generate; });
}

static part<combiner> combiner_from(const std::string & name) {
    return find_part(name, [](const policy & p) { return p.combine; });
}

static py::dict to_dict(const statistics & s) {
    return py::dict("sum"_a = s.sum, "n_window"_a = s.n_window, "decay"_a = s.decay, "rows"_a = s.rows);
}

static py::dict to_dict(const policy & p) {
    return py::dict("name"_a = p.name, "scorer"_a = p.score->name(), "layer_budget"_a = p.layers->name(), "selector"_a = p.select->name(),
                    "combiner"_a = p.combine->name(), "evictor"_a = p.generate->name(), "summary"_a = p.summary,
                    "needs"_a = to_dict(p.needs()), "keeps_all"_a = p.keeps_all(), "merges"_a = p.merges(), "evicts"_a = p.evicts(),
                    "overdraft"_a = p.overdraft(), "varies_layers"_a = p.varies_layers(), "can_vary_layers"_a = p.can_vary_layers());
}

static ggml_type type_from(const std::string & name) {
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const char * known = ggml_type_name((ggml_type) i);
        if (known && name == known) {
            return (ggml_type) i;
        }
    }
    throw error("[type] got \"" + name + "\", expected a ggml type such as f16 or q8_0");
}

static cells make_cells(const u8_array & kind, const u8_array & pinned) {
    cells c;
    for (py::ssize_t i = 0; i < kind.size(); ++i) {
        if (kind.at(i) > (uint8_t) cell_kind::generated) {
            throw error("[cells] kind: got " + std::to_string(kind.at(i)) + ", expected 0 (text), 1 (image) or 2 (generated)");
        }
        c.kind.push_back((cell_kind) kind.at(i));
    }
    c.pinned.assign(pinned.data(), pinned.data() + pinned.size());
    return c;
}

// keys and values given as arrays [n_layer, n_head_kv, n_cells, n_embd_head]
struct array_rows : row_source {
    array_rows(const f32_array & k, const f32_array & v, const f32_array & importance) : k(k), v(v) {
        for (const auto * a : { &k, &v }) {
            bool fits = a->ndim() == 4;
            for (int i = 0; fits && i < 3; ++i) {
                fits = a->shape(i) == importance.shape(i);
            }
            if (!fits) {
                throw error("[make_plan] keys and values: their shape does not agree with the importance");
            }
        }
    }
    int32_t n_embd_head_k() const override { return (int32_t) k.shape(3); }
    int32_t n_embd_head_v() const override { return (int32_t) v.shape(3); }
    void    load_k(int32_t il, int32_t ih, float * dst) const override { load(k, il, ih, dst); }
    void    load_v(int32_t il, int32_t ih, float * dst) const override { load(v, il, ih, dst); }

  private:
    f32_array k;
    f32_array v;

    static void load(const f32_array & a, int32_t il, int32_t ih, float * dst) {
        const float * src = a.data(il, ih, 0, 0);
        std::copy(src, src + a.shape(2) * a.shape(3), dst);
    }
};

static py::dict py_make_plan(const std::string & name, int32_t n_keep, int32_t n_sink, const u8_array & kind, const u8_array & pinned,
                             const f32_array & importance, const std::optional<f32_array> & recent, const std::optional<f32_array> & keys,
                             const std::optional<f32_array> & values, int32_t n_threads, const std::vector<float> & layer_share,
                             const std::optional<u8_array> & masked, const std::optional<u8_array> & old,
                             const std::vector<int32_t> & tokens, const std::optional<py::function> & scorer) {
    cells c  = make_cells(kind, pinned);
    c.tokens = tokens;
    if (old) {
        c.old.assign(old->data(), old->data() + old->size());
    }
    if (masked) {
        c.masked.assign(masked->data(), masked->data() + masked->size());
    }
    importance_map m = { make_map(importance, "importance"), {} };
    if (recent) {
        m.recent = make_map(*recent, "recent");
    }

    std::optional<array_rows> source;
    if (keys && values) {
        source.emplace(*keys, *values, importance);
    }

    const policy & named = find_policy(name);
    const policy   pol   = scorer ? with_scorer(named, python_scorer(*scorer, named.score->needs())) : named;
    plan           p;
    {
        py::gil_scoped_release release;
        const plan_params      params = { n_keep, n_sink, layer_share };
        p                             = make_plan(pol, params, c, m, source ? &*source : nullptr, n_threads);
        validate(p, c, sink_cells(pol.select, params));
    }
    py::dict res      = to_dict(p);
    res["positions"]  = to_array(rank_positions(p));
    res["rank_score"] = to_array(p.rank_score);

    res["key_weight"] = to_array(p.key_weight);
    res["weight"]     = to_array(p.weight);
    return res;
}

// checked here because ggml aborts on a type without rows or an incomplete block
static int64_t row_bytes(ggml_type type, int64_t n_head_kv, int64_t n_embd_head) {
    if (!rows_supported(type)) {
        throw error(std::string("[rows] got type ") + ggml_type_name(type) + ", which is not supported");
    }
    if (n_head_kv < 1 || n_embd_head < 1 || n_embd_head % ggml_blck_size(type) != 0) {
        throw error("[rows] n_embd_head: got " + std::to_string(n_embd_head) + ", expected a multiple of " +
                    std::to_string(ggml_blck_size(type)));
    }
    return n_head_kv * (int64_t) ggml_row_size(type, n_embd_head);
}

static kv_rows make_rows(std::vector<uint8_t> & bytes, const std::string & type, int64_t n_rows, int32_t n_head_kv, int32_t n_embd_head) {
    kv_rows t;
    t.type        = type_from(type);
    t.data        = bytes.data();
    t.n_head_kv   = n_head_kv;
    t.n_embd_head = n_embd_head;
    t.n_rows      = n_rows;
    t.row_bytes   = row_bytes(t.type, n_head_kv, n_embd_head);
    if (n_rows < 0 || (int64_t) bytes.size() != t.row_bytes * n_rows) {
        throw error("[rows] buffer: got " + std::to_string(bytes.size()) + " bytes, expected " + std::to_string(t.row_bytes * n_rows));
    }
    return t;
}

// one layer: kept [1, H, N], bucket [1, H, T], importance/count/bias [1, H, T]
static py::tuple py_merge_layer(const std::string & rule, const i32_array & kept, const i32_array & bucket, const u8_array & k,
                                const std::string & type_k, const u8_array & v, const std::string & type_v, int32_t n_embd_head,
                                int64_t n_rows, const std::vector<int32_t> & rows_src, const std::vector<int32_t> & rows_dst,
                                const f32_array & importance, const f32_array & count, const f32_array & bias,
                                const std::optional<f32_array> & weight, const std::vector<float> & key_weight) {
    if (kept.ndim() != 3 || bucket.ndim() != 3 || kept.shape(0) != 1) {
        throw error("[merge_layer] plan: expected kept [1, n_head_kv, n_keep] and bucket [1, n_head_kv, n_cells]");
    }
    plan p;
    p.n_layer   = 1;
    p.n_head_kv = (int32_t) kept.shape(1);
    p.n_keep    = (int32_t) kept.shape(2);
    p.n_cells   = (int32_t) bucket.shape(2);

    p.key_weight = key_weight.empty() ? std::vector<float>(p.n_cells) : key_weight;
    p.weight     = make_map(weight ? *weight : importance, "weight");
    p.kept.assign(kept.data(), kept.data() + kept.size());
    p.bucket.assign(bucket.data(), bucket.data() + bucket.size());

    cells c;
    c.kind.assign(p.n_cells, cell_kind::text);
    c.pinned.assign(p.n_cells, 0);
    validate(p, c, 0);  // no sinks asked for

    std::vector<uint8_t> bytes_k(k.data(), k.data() + k.size());
    std::vector<uint8_t> bytes_v(v.data(), v.data() + v.size());
    const kv_rows        t_k = make_rows(bytes_k, type_k, n_rows, p.n_head_kv, n_embd_head);
    const kv_rows        t_v = make_rows(bytes_v, type_v, n_rows, p.n_head_kv, n_embd_head);

    const cell_state in = { make_map(importance, "importance"), make_map(count, "count"), make_map(bias, "bias") };
    for (const auto * m : { &in.importance, &in.count, &in.bias, &std::as_const(p).weight }) {
        if (m->n_layer != 1 || m->n_head_kv != p.n_head_kv || m->n_cells != p.n_cells) {
            throw error("[merge_layer] importance, count, bias and weight: expected [1, n_head_kv, n_cells] like the plan");
        }
    }
    cell_state out = { head_map(1, p.n_head_kv, p.n_keep), head_map(1, p.n_head_kv, p.n_keep), head_map(1, p.n_head_kv, p.n_keep) };
    merge_layer(p, combiner_from(rule), 0, t_k, t_v, rows_src, rows_dst, in, out);

    return py::make_tuple(to_array(bytes_k), to_array(bytes_v), to_array(out.importance), to_array(out.count), to_array(out.bias));
}

static std::vector<int32_t> all_rows(int64_t n) {
    std::vector<int32_t> res((size_t) n);
    std::iota(res.begin(), res.end(), 0);
    return res;
}

static py::array_t<uint8_t> quantize_rows(const std::string & type, const f32_array & x) {
    if (x.ndim() != 2) {
        throw error("[quantize_rows] got " + std::to_string(x.ndim()) + " dimensions, expected [n, d]");
    }
    const int64_t        n = x.shape(0);
    const int32_t        d = (int32_t) x.shape(1);
    std::vector<uint8_t> res((size_t) (n * row_bytes(type_from(type), 1, d)));
    write_f32(make_rows(res, type, n, 1, d), all_rows(n), 0, x.data());
    return to_array(res);
}

static py::array_t<float> dequantize_rows(const std::string & type, const u8_array & bytes, int32_t d) {
    std::vector<uint8_t> data(bytes.data(), bytes.data() + bytes.size());
    const int64_t        n = (int64_t) data.size() / row_bytes(type_from(type), 1, d);
    py::array_t<float>   res({ n, (int64_t) d });
    read_f32(make_rows(data, type, n, 1, d), all_rows(n), 0, res.mutable_data());
    return res;
}

void bind_core(py::module_ & m) {
    py::module_ core = m.def_submodule("core", "The pure functions of the core, for tests and inspection; prone to change.");

    bind_view(core);
    core.def(
        "budget_cells", [](double value, int64_t n_tokens) { return budget::from_value(value).cells_for(n_tokens); }, py::arg("value"),
        py::arg("n_tokens"), "Cells that a budget (fraction kept, or number of cells) allows for n_tokens.");
    core.def(
        "policies",
        [] {
            py::list res;
            for (const auto & p : policies()) {
                res.append(to_dict(p));
            }
            return res;
        },
        "The table of policies: their parts, and what they can do.");
    core.def("make_plan", &py_make_plan, py::arg("policy"), py::arg("n_keep"), py::arg("n_sink"), py::arg("kind"), py::arg("pinned"),
             py::arg("importance"), py::arg("recent") = py::none(), py::arg("keys") = py::none(), py::arg("values") = py::none(),
             py::arg("n_threads") = 1, py::arg("layer_share") = std::vector<float>(), py::arg("masked") = py::none(),
             py::arg("old") = py::none(), py::arg("tokens") = std::vector<int32_t>(), py::arg("scorer") = py::none(),
             "Plan one compression: dict of kept [L, H, N] (-1: masked in the layer), bucket [L, H, T] (-1: evicted), positions [N] and "
             "rank_score [N]. With layer_share [L], N is what the layers that keep most hold; masked [L, T]: cells masked "
             "already. old [T]: text of earlier turns; tokens [T]: tokens that each cell stands for (empty: one each). scorer: a "
             "callable that gets a ScoreView and returns the scores [L, H, T], in place of the policy's own.");
    core.def(
        "split_with_past",
        [](int32_t n_keep, const u8_array & kind, const u8_array & old, const std::vector<int32_t> & tokens,
           const std::optional<u8_array> & masked) {
            const size_t n      = (size_t) kind.size();
            const bool   agrees = n > 0 && ((size_t) old.size() == n || old.size() == 0) && (tokens.empty() || tokens.size() == n) &&
                                (!masked || (size_t) masked->size() % n == 0);
            if (!agrees || n_keep < 0 || n_keep > (int32_t) n || (!tokens.empty() && *std::min_element(tokens.begin(), tokens.end()) < 1)) {
                throw error("[split_with_past] kind, old, tokens: expected one entry for each cell, tokens >= 1 and 0 <= n_keep <= " +
                            std::to_string(n));
            }
            cells c;
            for (size_t i = 0; i < n; ++i) {
                c.kind.push_back((cell_kind) kind.data()[i]);
            }
            c.old.assign(old.data(), old.data() + old.size());
            c.tokens = tokens;
            if (masked) {
                c.masked.assign(masked->data(), masked->data() + masked->size());
            }
            const auto s = split_with_past(n_keep, c);
            return py::make_tuple(s.n_text, s.n_image);
        },
        py::arg("n_keep"), py::arg("kind"), py::arg("old"), py::arg("tokens"), py::arg("masked") = py::none(),
        "Text and image cells that stay of n_keep in a later turn about an image. kind [T], old [T], tokens [T], masked [L, T].");
    core.def(
        "split_budget",
        [](int32_t n_keep, int32_t n_text, int32_t n_image) {
            const auto s = split_budget(n_keep, n_text, n_image);
            return py::make_tuple(s.n_text, s.n_image);
        },
        py::arg("n_keep"), py::arg("n_text"), py::arg("n_image"), "Text and image cells that stay of n_keep.");
    core.def(
        "cell_to_evict",
        [](const std::string & rule, const u8_array & kind, const u8_array & pinned, int32_t n_prompt, int32_t offset, int32_t n_sink,
           const std::vector<float> & total) {
            const cells c = make_cells(kind, pinned);
            if ((int32_t) c.pinned.size() != c.size() || (int32_t) total.size() != c.size()) {
                throw error("[cell_to_evict] kind, pinned and total must have one entry per cell");
            }
            return cell_to_evict(evictor_from(rule), c, n_prompt, offset, n_sink, total);
        },
        py::arg("rule"), py::arg("kind"), py::arg("pinned"), py::arg("n_prompt"), py::arg("offset"), py::arg("n_sink"), py::arg("total"),
        "Logical index of the cell to evict, -1 for none.");
    core.def(
        "eviction_candidates",
        [](const std::string & rule, const u8_array & kind, const u8_array & pinned, int32_t n_sink, const std::vector<float> & total) {
            const cells c = make_cells(kind, pinned);
            if ((int32_t) c.pinned.size() != c.size() || (int32_t) total.size() != c.size()) {
                throw error("[eviction_candidates] kind, pinned and total must have one entry per cell");
            }
            return eviction_candidates(evictor_from(rule), c, n_sink, total);
        },
        py::arg("rule"), py::arg("kind"), py::arg("pinned"), py::arg("n_sink"), py::arg("total"),
        "Logical indices of the cells among which each head loses one of its own.");
    core.def("merge_layer", &py_merge_layer, py::arg("rule"), py::arg("kept"), py::arg("bucket"), py::arg("k"), py::arg("type_k"),
             py::arg("v"), py::arg("type_v"), py::arg("n_embd_head"), py::arg("n_rows"), py::arg("rows_src"), py::arg("rows_dst"),
             py::arg("importance"), py::arg("count"), py::arg("bias"), py::arg("weight") = py::none(),
             py::arg("key_weight") = std::vector<float>(),
             "Carry out a plan of one layer on copies of K and V, by weights [1, H, T] that are the importance unless given; the keys of "
             "anchors "
             "move by key_weight [T]. Returns (k, v, importance, count, bias).");
    core.def("quantize_rows", &quantize_rows, py::arg("type"), py::arg("x"), "Rows of f32 [n, d] as stored bytes.");
    core.def("dequantize_rows", &dequantize_rows, py::arg("type"), py::arg("bytes"), py::arg("d"), "Stored bytes as f32 [n, d].");
}

}  // namespace elastic
