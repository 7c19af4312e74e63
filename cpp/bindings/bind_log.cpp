// The log of the native libraries, handled without Python: a Python callback inside of native code would swallow Ctrl-C.

#include "bindings/bindings.h"

#include "llama.h"

#include <cstdio>
#include <deque>
#include <mutex>
#include <string>

#include <pybind11/stl.h>

namespace py = pybind11;

namespace elastic {

namespace {

constexpr size_t N_KEPT = 32;  // complaints that are kept for the next exception

struct log_state {
    std::mutex              mutex;
    int                     shown = GGML_LOG_LEVEL_ERROR;  // least level that goes to stderr, above ERROR: nothing does
    int                     last  = GGML_LOG_LEVEL_NONE;   // of the line that CONT goes on with
    std::deque<std::string> kept;                          // warnings and errors
};

log_state & state() {
    static auto * res = new log_state();  // never freed: libraries may log while the process ends
    return *res;
}

// ggml numbers DEBUG 1, INFO 2, WARN 3, ERROR 4
void on_log(ggml_log_level level, const char * text, void *) {
    auto &                            s = state();
    const std::lock_guard<std::mutex> lock(s.mutex);
    const bool                        goes_on = level == GGML_LOG_LEVEL_CONT;
    s.last                                    = goes_on ? s.last : level;
    if (s.last >= GGML_LOG_LEVEL_WARN) {
        if (goes_on && !s.kept.empty()) {
            s.kept.back() += text;
        } else {
            s.kept.emplace_back(text);
        }
        if (s.kept.size() > N_KEPT) {
            s.kept.pop_front();
        }
    }
    if (s.last >= s.shown) {
        std::fputs(text, stderr);
        std::fflush(stderr);
    }
}

}  // namespace

void bind_log(py::module_ & m) {
    m.def(
        "route_log",
        [](int level) {
            {
                auto &                            s = state();
                const std::lock_guard<std::mutex> lock(s.mutex);
                s.shown = level;
            }
            llama_log_set(on_log, nullptr);
            return reinterpret_cast<uintptr_t>(&on_log);
        },
        py::arg("level"),
        "Send llama.cpp's log of this level and above to stderr (1 debug, 2 info, 3 warning, 4 error, 5 nothing). Returns the "
        "address of the ggml_log_callback, for other libraries.");
    m.def(
        "take_log",
        [] {
            auto &                            s = state();
            const std::lock_guard<std::mutex> lock(s.mutex);
            std::vector<std::string>          res(s.kept.begin(), s.kept.end());
            s.kept.clear();
            return res;
        },
        "The latest warnings and errors of the native libraries, oldest first; forgotten after this.");
}

}  // namespace elastic
