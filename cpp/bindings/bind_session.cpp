// _core.Session: the elastic cache of one llama_context, by address of the context.

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "bindings/python_scorer.h"
#include "runtime/attach.h"
#include "runtime/inspect.h"
#include "runtime/measure_layers.h"

#include <pybind11/stl.h>

#include <optional>

namespace py = pybind11;

using namespace pybind11::literals;

namespace elastic {

// The context belongs to llama-cpp-python; the session must be detached before it is freed.
class session {
  public:
    session(uintptr_t address, const std::string & policy, double budget, int32_t n_sink, int32_t offset, int32_t min_cells,
            int32_t n_threads, int32_t max_cells, int32_t overdraft, int32_t checkpoints, const std::vector<float> & layer_share,
            bool auto_layers, bool record, bool release_memory, int32_t n_question, const std::optional<py::function> & scorer)
        : ctx(reinterpret_cast<llama_context *>(address)) {
        if (!ctx) {
            throw error("[Session] ctx: got a null address, expected a llama_context");
        }
        elastic_params params = elastic_default_params();
        params.policy         = policy.c_str();
        params.budget         = budget;
        params.n_sink         = n_sink;
        params.offset         = offset;
        params.min_cells      = min_cells;
        params.n_threads      = n_threads;
        params.max_cells      = max_cells;
        params.overdraft      = overdraft;
        params.n_checkpoints  = checkpoints;
        params.layers         = auto_layers ? ELASTIC_LAYERS_AUTO : layer_share.empty() ? ELASTIC_LAYERS_EVEN : ELASTIC_LAYERS_GIVEN;
        params.layer_share    = layer_share.data();
        params.n_layer_share  = (int32_t) layer_share.size();
        params.record         = record;
        params.release_memory = release_memory;
        params.n_question     = n_question;
        part<elastic::scorer> external;
        if (scorer) {
            external = python_scorer(*scorer, find_policy(policy).score->needs());
        }
        const py::gil_scoped_release release;
        attach(*ctx, params, external);
    }

    elastic_cache & cache() const {
        auto * res = attached(ctx);
        if (!res) {
            throw error("[Session] the session is detached; make a new one");
        }
        return *res;
    }

    elastic_cache & cache(llama_seq_id seq_id) const {
        auto & res = cache();
        res.parts().check_seq_id(seq_id);
        return res;
    }

    void detach() {
        if (ctx) {
            elastic::detach(*ctx);
            ctx = nullptr;
        }
    }

    // llama_free frees the cache with the context, only the address is forgotten
    void forget() { ctx = nullptr; }

    bool is_attached() const { return ctx && attached(ctx); }

  private:
    llama_context * ctx;
};

static py::dict stats_dict(const elastic_cache & cache) {
    const elastic_stats s = cache.stats();
    return py::dict("checkpoint_bytes"_a = s.n_bytes_checkpoints, "compressions"_a = s.n_compressions, "evictions"_a = s.n_evictions,
                    "cells_before"_a = s.n_cells_before, "cells_after"_a = s.n_cells_after, "bytes_before"_a = s.n_bytes_before,
                    "bytes_after"_a = s.n_bytes_after, "bytes_other"_a = s.n_bytes_other, "bytes_released"_a = s.n_bytes_released,
                    "score_us"_a = s.t_score_us, "plan_us"_a = s.t_plan_us, "merge_us"_a = s.t_merge_us);
}

static py::tuple read_layer(const session & self, llama_seq_id seq_id, int32_t il) {
    const auto x = read_kv(self.cache(seq_id).parts(), seq_id, il);
    return py::make_tuple(to_array(x.k).reshape({ x.n_cells, x.n_head_kv, x.n_embd_head_k }),
                          to_array(x.v).reshape({ x.n_cells, x.n_head_kv, x.n_embd_head_v }));
}

static py::dict read_cells(const session & self, llama_seq_id seq_id) {
    std::vector<int32_t> index;
    std::vector<int32_t> pos;
    std::vector<int32_t> kind;
    for (const auto & cell : describe_cells(self.cache(seq_id).parts(), seq_id)) {
        index.push_back(cell.index);
        pos.push_back(cell.pos);
        kind.push_back((int32_t) cell.kind);
    }
    return py::dict("index"_a = to_array(index), "pos"_a = to_array(pos), "kind"_a = to_array(kind));
}

static py::tuple read_recent(const session & self, llama_seq_id seq_id) {
    const auto & parts = self.cache(seq_id).parts();
    return py::make_tuple(to_array(importance_of(parts, seq_id).decayed), to_array(windowed_of(parts, seq_id)));
}

// what ElasticConfig and the keywords of Session start from, by their names there
static py::dict defaults_dict(const elastic_params & p) {
    const char * layers = p.layers == ELASTIC_LAYERS_AUTO ? "auto" : "even";
    return py::dict("policy"_a = p.policy, "budget"_a = p.budget, "n_sink"_a = p.n_sink, "offset"_a = p.offset, "min_cells"_a = p.min_cells,
                    "n_threads"_a = p.n_threads, "max_cells"_a = p.max_cells, "overdraft"_a = p.overdraft,
                    "checkpoints"_a = p.n_checkpoints, "layers"_a = layers, "record"_a = p.record, "release_memory"_a = p.release_memory);
}

// whether the memory of rows that single layers do without can be given back; false, too, where there is no plain KV cache
static bool frees_layers(uintptr_t address) {
    auto * ctx = reinterpret_cast<llama_context *>(address);
    if (!ctx) {
        throw error("[frees_layers] ctx must not be null");
    }
    try {
        return resident_memory::can_free_layers(kv_view(*ctx));
    } catch (const unsupported &) {
        return false;
    }
}

static py::dict memory_dict(const kv_view & kv) {
    const elastic_memory x = describe_memory(kv);
    return py::dict("kind"_a = x.kind, "n_layer_model"_a = x.n_layer_model, "n_layer"_a = x.n_layer, "cell_bytes"_a = x.cell_bytes,
                    "other_bytes"_a = x.other_bytes, "other_cells"_a = x.other_cells, "recurrent"_a = x.recurrent);
}

static py::dict memory_of(uintptr_t address) {
    auto * ctx = reinterpret_cast<llama_context *>(address);
    if (!ctx) {
        throw error("[memory] ctx must not be null");
    }
    return memory_dict(kv_view(*ctx));
}

static py::tuple in_use(uintptr_t address, llama_seq_id seq_id) {
    auto * ctx = reinterpret_cast<llama_context *>(address);
    if (!ctx) {
        throw error("[bytes_in_use] ctx must not be null");
    }
    const memory_parts parts(*ctx);
    if (seq_id < 0 || seq_id >= (llama_seq_id) parts.n_seq_max()) {
        throw error("[bytes_in_use] seq_id: got " + std::to_string(seq_id) + ", expected 0 <= seq_id < n_seq_max");
    }
    const bytes_in_use res = parts.in_use(seq_id);
    return py::make_tuple(res.attention, res.other);
}

void bind_session(py::module_ & m) {
    const elastic_params d = elastic_default_params();

    m.def("default_params", [] { return defaults_dict(elastic_default_params()); }, "Parameters of an elastic cache where none are given.");
    m.def("lazy_buffers", &elastic_lazy_buffers, py::arg("value"),
          "Whether the K and V buffers of contexts that this thread makes from now on are left untouched until they are used.");

    m.def(
        "measure_layers",
        [](uintptr_t model, int32_t n_threads) {
            if (!model || n_threads < 1) {
                throw error("[measure_layers] model must not be null, and n_threads at least 1");
            }
            return measure_layers(reinterpret_cast<llama_model *>(model), n_threads);
        },
        py::arg("model"), py::arg("n_threads"), py::call_guard<py::gil_scoped_release>(),
        R"pbdoc(How much each layer of the cache looks words up, list of float [n_layer] in [0, 1].

Takes a context of its own, a prompt of 56 tokens and 32 steps. `model`: address of the llama_model.

Raises NotImplementedError for a model whose memory cannot be compressed, ValueError or RuntimeError.)pbdoc");
    m.def("frees_layers", &frees_layers, py::arg("ctx"), py::call_guard<py::gil_scoped_release>(),
          "Whether rows that single layers of the llama_context at this address do without can go back to the operating system.");
    m.def("memory", &memory_of, py::arg("ctx"),
          R"pbdoc(What an elastic cache of the llama_context at this address works on; none needs to be attached.

dict of kind ("plain", "sliding window", "hybrid", "hybrid, sliding window"), n_layer_model, n_layer (compressed),
cell_bytes (K and V of one cell of those layers), other_bytes (allocated by windows and recurrent states, which are left
alone), other_cells (of the windows, or states) and recurrent (no probes, no cuts, no checkpoints).

Raises NotImplementedError, with the reason, for a memory that cannot be compressed.)pbdoc");
    m.def("bytes_in_use", &in_use, py::arg("ctx"), py::arg("seq_id") = 0,
          R"pbdoc(Bytes that a sequence of the llama_context at this address holds: (attention, other).

attention: K and V of the part that an elastic cache compresses. other: of windows, with cells that they have passed and not
used again, and of its recurrent state. No elastic cache needs to be attached.

Raises NotImplementedError, with the reason, for a memory that cannot be compressed, ValueError for a sequence out of range.)pbdoc");
    m.def("layer_shares", &layer_shares, py::arg("scores"),
          "Cells that each layer is to hold by its score, mean 1; empty where all are alike. ValueError for scores < 0 or not finite.");

    py::class_<session>(m, "Session", "The elastic KV cache of one llama_context.")
        .def(py::init<uintptr_t, const std::string &, double, int32_t, int32_t, int32_t, int32_t, int32_t, int32_t, int32_t,
                      const std::vector<float> &, bool, bool, bool, int32_t, const std::optional<py::function> &>(),
             py::arg("ctx"), py::kw_only(), py::arg("policy") = d.policy, py::arg("budget") = d.budget, py::arg("n_sink") = d.n_sink,
             py::arg("offset") = d.offset, py::arg("min_cells") = d.min_cells, py::arg("n_threads") = d.n_threads,
             py::arg("max_cells") = d.max_cells, py::arg("overdraft") = d.overdraft, py::arg("checkpoints") = d.n_checkpoints,
             py::arg("layer_share") = std::vector<float>(), py::arg("auto_layers") = d.layers == ELASTIC_LAYERS_AUTO,
             py::arg("record") = d.record, py::arg("release_memory") = d.release_memory, py::arg("n_question") = d.n_question,
             py::arg("scorer") = py::none(),
             R"pbdoc(Attach an elastic cache to the llama_context at address `ctx`.

A sequence never holds more cells than `max_cells` and one ubatch, or one batch where batches are
larger (0: no such cap). `overdraft`: cells beyond the budget that an answer may take (-1: what the
policy is made for). `checkpoints`: states that are kept of each sequence so that what came later
can be taken back (0: none). `layer_share`: cells of each layer of the cache in relation to the others',
> 0, while the budget holds on average (policy "elastic", without max_cells; empty: all the same); with
`auto_layers` only where rows of single layers can go back to the operating system, and measured if empty. With
`release_memory`, rows that are not in use go back to the operating system. With `record`, every score
that any policy looks at is kept, so that a saved prompt can be loaded under each of them. `n_question`: cells of the budget that
stay free where `compress` finds an image at the end, for its question. `scorer`: a callable that is given a ScoreView at each compression and returns
scores float32 [n_layer, n_head_kv, n_cells], finite and >= 0, higher = keep; instead of the scores of `policy`, whose
other parts stay.

Raises ValueError for a bad parameter, NotImplementedError for a memory that cannot be compressed,
RuntimeError when the cache holds cells already.)pbdoc")
        .def("detach", &session::detach, py::call_guard<py::gil_scoped_release>(),
             "Switch the elastic cache off. RuntimeError while some cell carries an attention bias.")
        .def("forget", &session::forget, "Forget the context without touching it; for when it is about to be freed.")
        .def_property_readonly("is_attached", &session::is_attached)
        .def(
            "set_prefill", [](const session & self, bool value) { self.cache().set_prefill(value); }, py::arg("value"),
            "While set, batches of one token are part of a prompt, which is compressed for max_cells only.")
        .def(
            "compress", [](const session & self, llama_seq_id seq_id) { return self.cache(seq_id).room().compress(seq_id); },
            py::arg("seq_id") = 0, py::call_guard<py::gil_scoped_release>(),
            "Compress the prompt of a sequence now; returns the number of cells it holds after.")
        .def(
            "compress_prefix",
            [](const session & self, double value, llama_seq_id seq_id) {
                return self.cache(seq_id).room().compress_prefix(seq_id, budget::from_value(value));
            },
            py::arg("budget"), py::arg("seq_id") = 0, py::call_guard<py::gil_scoped_release>(),
            R"pbdoc(Compress a prompt that others begin with, by a budget of its own; returns the number of cells it holds after.

No checkpoint is taken, so that a saved state has its K and V once.)pbdoc")
        .def(
            "equalize_layers", [](const session & self, llama_seq_id seq_id) { return self.cache(seq_id).room().equalize_layers(seq_id); },
            py::arg("seq_id") = 0, py::call_guard<py::gil_scoped_release>(),
            "Give all layers of a sequence as many cells, on average as many as before; returns n_cells.")
        .def(
            "begin_probe", [](const session & self) { self.cache().begin_probe(); }, py::call_guard<py::gil_scoped_release>(),
            R"pbdoc(What is decoded from now on is taken back by end_probe, as if it had never been decoded.

What its tokens attended to stays part of the importance of the prompts that are there.

Raises ValueError while a probe is running, and where there can be none (`can_probe`).)pbdoc")
        .def(
            "end_probe", [](const session & self) { self.cache().end_probe(); }, py::call_guard<py::gil_scoped_release>())
        .def(
            "memory", [](const session & self) { return memory_dict(self.cache().parts().kv); },
            "What the cache works on, and what is left alone: dict as of `memory(ctx)`.")
        .def(
            "can_probe", [](const session & self) { return self.cache().can_probe(); },
            "Whether what is decoded can be taken back; not with recurrent layers.")
        .def(
            "n_free", [](const session & self, llama_seq_id seq_id) { return self.cache(seq_id).parts().kv.parts.n_free(seq_id); },
            py::arg("seq_id") = 0, "Tokens that find a cell now, in the part of the memory that has fewest.")
        .def(
            "next_pos", [](const session & self, llama_seq_id seq_id) { return self.cache(seq_id).parts().kv.pos_next(seq_id); },
            py::arg("seq_id") = 0, "Position of the next token; behind an image with M-RoPE its height and width count.")
        .def(
            "n_to_drop", [](const session & self, llama_seq_id seq_id) { return self.cache(seq_id).room().n_to_drop(seq_id); },
            py::arg("seq_id") = 0,
            "Cells that the compression of the sequence's prompt is going to take away; 0 if it has been compressed.")
        .def(
            "can_cut", [](const session & self, llama_pos p0, llama_seq_id seq_id) { return self.cache(seq_id).can_cut(seq_id, p0); },
            py::arg("p0"), py::arg("seq_id") = 0,
            "The largest position <= p0 from which on everything can be removed exactly; 0: only the whole sequence.")
        .def(
            "make_room",
            [](const session & self, int32_t n_new, llama_seq_id seq_id) { return self.cache(seq_id).room().make_room(seq_id, n_new); },
            py::arg("n_new"), py::arg("seq_id") = 0, py::call_guard<py::gil_scoped_release>(),
            "Free cells for `n_new` tokens, if it takes no more than compressing what is beyond the budget; returns n_cells.")
        .def(
            "restore_logits", [](const session & self, llama_seq_id seq_id) { return self.cache(seq_id).restore_logits(seq_id); },
            py::arg("seq_id") = 0, py::call_guard<py::gil_scoped_release>(),
            "Make the logits after a prompt's last token, which is the sequence's last, those of the context; False: not known.")
        .def(
            "n_cells", [](const session & self, llama_seq_id seq_id) { return self.cache(seq_id).parts().kv.n_cells(seq_id); },
            py::arg("seq_id") = 0, "Cells the sequence holds; with layer_share not every layer holds all of them.")
        .def(
            "n_per_layer", [](const session & self, llama_seq_id seq_id) { return self.cache(seq_id).parts().n_per_layer(seq_id); },
            py::arg("seq_id") = 0, "Cells that a layer holds of the sequence, on average over the layers, rounded up.")
        .def(
            "frees_rows", [](const session & self) { return self.cache().parts().memory.frees_layers(); },
            "Whether rows masked in single layers (layer_share) go back to the operating system.")
        .def(
            "attention",
            [](const session & self) {
                std::vector<std::string> res;
                for (const auto way : self.cache().layer_ways()) {
                    res.push_back(name_of(way));
                }
                return res;
            },
            "How attention that is scored or biased is computed in each layer of the cache: \"own op\" (on the CPU), \"fused op, a mask "
            "per "
            "head\", \"fused op, a head as a stream\" or \"plain ops\".")
        .def(
            "layer_share", [](const session & self) { return self.cache().parts().cfg.layer_share; },
            "Cells of each layer in relation to the others', as resolved when attaching; empty: all as many.")
        .def(
            "cells_per_layer",
            [](const session & self, llama_seq_id seq_id) { return to_array(self.cache(seq_id).parts().cells_per_layer(seq_id)); },
            py::arg("seq_id") = 0, "Cells that each layer holds of the sequence, int32 [n_layer].")
        .def(
            "kv_bytes", [](const session & self, llama_seq_id seq_id) { return self.cache(seq_id).parts().kv_bytes(seq_id); },
            py::arg("seq_id") = 0, "Bytes of K, V and bias that the layers hold of the sequence.")
        .def(
            "other_bytes",
            [](const session & self, llama_seq_id seq_id) { return self.cache(seq_id).parts().kv.parts.in_use(seq_id).other; },
            py::arg("seq_id") = 0, "Bytes that the sequence holds in windows and recurrent states, which are not compressed.")
        .def(
            "n_tokens", [](const session & self, llama_seq_id seq_id) { return self.cache(seq_id).parts().seqs.get(seq_id).n_tokens; },
            py::arg("seq_id") = 0,
            "Tokens decoded since the sequence was last empty; 0 where nothing is ever dropped (budget 1, policy full).")
        .def(
            "stats", [](const session & self) { return stats_dict(self.cache()); },
            "Counters since the last reset; times in microseconds, sizes in bytes.")
        .def("reset_stats", [](const session & self) { self.cache().reset_stats(); })
        .def(
            "kv_bytes_per_cell", [](const session & self) { return self.cache().cell_bytes(); },
            "Bytes of K, V and bias that one cell takes in all layers.")
        .def("cells", &read_cells, py::arg("seq_id") = 0,
             "Cells of a sequence in order of position: dict of int32 arrays index, pos, kind (0 text, 1 image, 2 generated).")
        .def(
            "importance",
            [](const session & self, llama_seq_id seq_id) { return to_array(importance_of(self.cache(seq_id).parts(), seq_id).sum); },
            py::arg("seq_id") = 0, "Importance, f32 [n_layer, n_head_kv, n_cells].")
        .def("recent", &read_recent, py::arg("seq_id") = 0,
             "Attention from the last queries: (decayed, windowed), each f32 [n_layer, n_head_kv, n_cells] or empty where not kept. "
             "Windowed: 0 once the prompt is compressed.")
        .def(
            "count", [](const session & self, llama_seq_id seq_id) { return to_array(counts_of(self.cache(seq_id).parts(), seq_id)); },
            py::arg("seq_id") = 0, "Tokens merged into each cell, f32 [n_layer, n_head_kv, n_cells].")
        .def(
            "bias", [](const session & self, llama_seq_id seq_id) { return to_array(bias_of(self.cache(seq_id).parts(), seq_id)); },
            py::arg("seq_id") = 0, "Attention bias, f32 [n_layer, n_head_kv, n_cells].")
        .def("read_kv", &read_layer, py::arg("seq_id"), py::arg("layer"),
             "K and V of one layer as f32 [n_cells, n_head_kv, n_embd_head], as stored (after RoPE).")
        .def(
            "last_plan", [](const session & self) { return to_dict(self.cache().last_plan()); },
            "Plan of the last compression: kept [L, H, n_keep], bucket [L, H, n_cells].");
}

}  // namespace elastic
