#pragma once

// A scorer written in Python.

#include "core/policy.h"

#include <pybind11/pybind11.h>

namespace elastic {

// Called once per compression with a ScoreView. What it raises goes on to the caller of make_plan, as pybind11::error_already_set
part<scorer> python_scorer(const pybind11::function & fn, const statistics & needs);

void bind_view(pybind11::module_ & core);

}  // namespace elastic
