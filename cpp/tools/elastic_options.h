#pragma once

// Options of the KV cache policy and of media for llama.cpp's own tools, of the process; off by default.

#include <functional>

struct common_arg;
struct common_params;
struct llama_context;
struct llama_context_params;
struct llama_model;

// the options, for llama.cpp's parser of arguments
void elastic_add_options(const std::function<void(common_arg)> & add);

// llama_init_from_model, and the elastic cache attached if the options say so; nullptr with the reason in the log. Of the parameters it
// changes what cannot be beside the cache: flash attention goes on, llama.cpp's own checkpoints off
llama_context * elastic_init_context(common_params & params, llama_model * model, llama_context_params cparams);

// whether a prompt is compressed after its last image, before its question is known
bool elastic_has_image_checkpoint();
