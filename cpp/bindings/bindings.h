#pragma once

#include <pybind11/pybind11.h>

namespace elastic {

void bind_build_info(pybind11::module_ & m);
void bind_core(pybind11::module_ & m);
void bind_log(pybind11::module_ & m);
void bind_session(pybind11::module_ & m);

}  // namespace elastic
