#pragma once

// The block that the elastic cache appends to llama.cpp's state: what is known of each sequence and its cells.

#include "runtime/cache_parts.h"
#include "runtime/checkpoint.h"
#include "runtime/prompt_logits.h"

class llama_io_read_i;
class llama_io_write_i;

namespace elastic {

// seq_id -1: all sequences
void write_state(const cache_parts & parts, const checkpoints & taken, llama_io_write_i & io, llama_seq_id seq_id);

// after llama.cpp has restored its cells. throws std::runtime_error
void read_state(cache_parts & parts, checkpoints & taken, prompt_logits & logits, llama_io_read_i & io, llama_seq_id seq_id);

}  // namespace elastic
