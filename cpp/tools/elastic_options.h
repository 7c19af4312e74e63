#pragma once

// Options of the KV cache policy and of media for llama.cpp's own tools. A part of common_params; off by default.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

struct common_arg;
struct common_params;
struct llama_context;
struct llama_context_params;

struct elastic_options {
    // the elastic cache (elastic.h). Naming any of the first three switches it on
    double      budget = -1.0;  // < 0: not given
    std::string policy;
    int32_t     max_cells        = 0;
    int32_t     n_checkpoints    = -1;     // -1: 2, or 4 with image_checkpoint
    bool        image_checkpoint = false;  // compress after the last image of a prompt, before its question is known

    bool is_on() const { return (budget >= 0.0 && budget != 1.0) || max_cells > 0 || (budget < 0.0 && !policy.empty()); }
};

// the options above, for llama.cpp's parser of arguments
void elastic_add_options(const std::function<void(common_arg)> & add);

// flash attention on, which the elastic cache needs, where it is left to llama.cpp
void elastic_adjust(const common_params & params, llama_context_params & cparams);

// llama_init_from_model, and the elastic cache attached if the options say so; nullptr with the reason in the log
llama_context * elastic_init_context(const common_params & params, const std::function<llama_context *()> & init);
