#pragma once

// What /metrics says of the elastic cache.

#include <cstdint>
#include <functional>

struct llama_context;

// takes the numbers of the context; between batches
void elastic_update_metrics(const llama_context * ctx, int32_t n_slots);

// add(type, name, description, value) for each that was taken last; from any thread
void elastic_each_metric(const std::function<void(const char *, const char *, const char *, double)> & add);
