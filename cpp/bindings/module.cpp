#include "bindings/bindings.h"
#include "runtime/elastic_cache.h"

namespace py = pybind11;

PYBIND11_MODULE(_core, m) {
    m.doc() = "Native part of elastic_llama: the elastic KV cache.";

    // ValueError and RuntimeError come from the C++ bases; this one has no base that pybind11 maps
    py::register_exception_translator([](std::exception_ptr p) {
        try {
            if (p) {
                std::rethrow_exception(p);
            }
        } catch (const elastic::unsupported & e) {
            PyErr_SetString(PyExc_NotImplementedError, e.what());
        }
    });

    elastic::bind_build_info(m);
    elastic::bind_core(m);
    elastic::bind_log(m);
    elastic::bind_session(m);
}
