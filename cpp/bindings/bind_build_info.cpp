#include "bindings/bindings.h"
#include "elastic_build_info.h"

#include "ggml-backend.h"
#include "ggml.h"
#include "kernels/level.h"
#include "llama.h"

#include <pybind11/stl.h>

namespace py = pybind11;

using namespace pybind11::literals;

namespace elastic {

// "a,b" -> ["a", "b"], "" -> []
static py::list list_of(const char * text) {
    return py::str(text).attr("replace")(",", " ").attr("split")();
}

static py::dict build_info() {
    std::vector<std::string> backends;
    for (size_t i = 0; i < ggml_backend_reg_count(); ++i) {
        backends.emplace_back(ggml_backend_reg_name(ggml_backend_reg_get(i)));
    }

    return py::dict("version"_a = ELASTIC_VERSION, "llama_cpp_commit"_a = ELASTIC_LLAMA_CPP_COMMIT,
                    "archive_sha256"_a = ELASTIC_ARCHIVE_SHA256, "series_hash"_a = ELASTIC_SERIES_HASH,
                    "patches"_a = list_of(ELASTIC_PATCHES), "ggml_version"_a = ggml_version(), "compiler"_a = ELASTIC_COMPILER,
                    "build_type"_a = ELASTIC_BUILD_TYPE, "backends"_a = backends, "cpu_features"_a = llama_print_system_info(),
                    "kernels"_a = kernel_level(), "amx"_a = bool(ELASTIC_AMX_ON), "sanitizers"_a = list_of(ELASTIC_SANITIZE_LIST));
}

void bind_build_info(py::module_ & m) {
    m.def("build_info", &build_info, "What this build is made of: llama.cpp commit, patches, backends, CPU features.");
}

}  // namespace elastic
