#include "bindings/python_scorer.h"

#include "bindings/arrays.h"

#include <pybind11/numpy.h>

namespace py = pybind11;

namespace elastic {

namespace {

// What a scorer in Python sees. Arrays belong to it, so they stay valid as long as they are looked at; keys and values are there
// during the call only.
class python_view {
  public:
    explicit python_view(const score_view & v) : importance(v.importance.sum), recent(v.importance.recent), c(v.c), rows(v.rows) {}

    head_map           importance;
    head_map           recent;  // empty where the policy needs none
    cells              c;
    const row_source * rows;

    py::array_t<float> keys(int32_t il, int32_t ih) const {
        return load(il, ih, source().n_embd_head_k(), [&](float * dst) { rows->load_k(il, ih, dst); });
    }
    py::array_t<float> values(int32_t il, int32_t ih) const {
        return load(il, ih, source().n_embd_head_v(), [&](float * dst) { rows->load_v(il, ih, dst); });
    }

  private:
    const row_source & source() const {
        if (!rows) {
            throw error("[scorer] keys and values: none were given, or the scorer has returned already");
        }
        return *rows;
    }

    template <typename F> py::array_t<float> load(int32_t il, int32_t ih, int32_t d, F read) const {
        if (il < 0 || il >= importance.n_layer || ih < 0 || ih >= importance.n_head_kv) {
            throw py::index_error("[scorer] keys and values: got layer " + std::to_string(il) + " and head " + std::to_string(ih) +
                                  ", expected 0 <= layer < " + std::to_string(importance.n_layer) + " and 0 <= head < " +
                                  std::to_string(importance.n_head_kv));
        }
        py::array_t<float> res({ importance.n_cells, d });
        read(res.mutable_data());
        return res;
    }
};

template <typename T> py::array view_of(const T * data, std::vector<py::ssize_t> shape, py::handle owner) {
    py::array res(py::dtype::of<T>(), std::move(shape), {}, data, owner);
    res.attr("flags").attr("writeable") = false;
    return res;
}

py::object map_view(const head_map & m, py::handle owner) {
    return m.n_cells == 0 ? py::object(py::none()) : py::object(view_of(m.data.data(), { m.n_layer, m.n_head_kv, m.n_cells }, owner));
}

head_map scores_from(const py::object & x) {
    auto a = x.is_none() ? f32_array() : f32_array::ensure(x);
    if (x.is_none() || !a) {
        PyErr_Clear();
        throw error("[scorer] got " + py::repr(py::type::of(x)).cast<std::string>() + ", expected an array of numbers");
    }
    return make_map(a, "scorer");
}

}  // namespace

// a callable as a scorer, called once per compression; what it raises goes on to the caller of make_plan
part<scorer> python_scorer(const py::function & fn, const statistics & needs) {
    // the last copy may go where nobody holds the interpreter lock
    const std::shared_ptr<py::function> kept(new py::function(fn), [](py::function * p) {
        const py::gil_scoped_acquire acquire;
        delete p;
    });
    return make_part<external_scorer>(
        [kept](const score_view & v) {
            const py::gil_scoped_acquire acquire;
            const py::object             view = py::cast(python_view(v));

            struct closing {  // also where it raises
                python_view & view;
                ~closing() { view.rows = nullptr; }
            } const after{ view.cast<python_view &>() };

            return scores_from((*kept)(view));
        },
        needs);
}

void bind_view(py::module_ & core) {
    py::class_<python_view>(core, "ScoreView", "What a scorer looks at: one sequence at one compression.")
        .def_property_readonly(
            "importance", [](const py::object & self) { return map_view(self.cast<const python_view &>().importance, self); },
            "Attention received from all queries, float32 [n_layer, n_head_kv, n_cells].")
        .def_property_readonly(
            "recent", [](const py::object & self) { return map_view(self.cast<const python_view &>().recent, self); },
            "Attention received from the last queries, of the same shape; None where the policy needs none.")
        .def_property_readonly(
            "kind",
            [](const py::object & self) {
                const auto & kind = self.cast<const python_view &>().c.kind;
                return view_of((const uint8_t *) kind.data(), { (py::ssize_t) kind.size() }, self);
            },
            "0: text, 1: image, 2: generated; uint8 [n_cells].")
        .def_property_readonly(
            "pinned",
            [](const py::object & self) {
                const auto & pinned = self.cast<const python_view &>().c.pinned;
                return view_of(pinned.data(), { (py::ssize_t) pinned.size() }, self);
            },
            "1: another sequence uses the cell too; uint8 [n_cells].")
        .def("keys", &python_view::keys, py::arg("layer"), py::arg("head"), "Keys of one KV head, float32 [n_cells, n_embd_head].")
        .def("values", &python_view::values, py::arg("layer"), py::arg("head"), "Values of one KV head, float32 [n_cells, n_embd_head].");
}

}  // namespace elastic
