// Of a portable build: llama.cpp's backends are libraries of their own, chosen at run time. They lie beside libggml, where
// llama.cpp does not look by itself; so they are loaded with libllama, for every program that uses it.

#include "ggml-backend.h"
#include "ggml.h"

#include <dlfcn.h>

#include <string>

namespace {

struct load_backends {
    load_backends() {
        Dl_info info;
        if (ggml_backend_reg_count() > 0 || !dladdr((const void *) &ggml_backend_load_all_from_path, &info)) {
            return;
        }
        const std::string path      = info.dli_fname;
        const size_t      slash     = path.rfind('/');
        ggml_log_callback known     = nullptr;
        void *            user_data = nullptr;
        ggml_log_get(&known, &user_data);
        ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);  // it would tell of every library
        ggml_backend_load_all_from_path(slash == std::string::npos ? "." : path.substr(0, slash).c_str());
        ggml_log_set(known, user_data);
    }
};

const load_backends at_load;

}  // namespace
