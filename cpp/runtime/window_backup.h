#pragma once

// What a probe may overwrite in the window part of a memory: llama.cpp places new tokens in cells that their sequence does not look at
// any more, and once the probe has been taken back it does.

#include "runtime/kv_shape.h"
#include "runtime/memory_parts.h"

#include <map>
#include <vector>

namespace elastic {

class window_backup {
  public:
    explicit window_backup(const memory_parts & parts) : parts(parts) {}

    // a probe begins: positions of the next token of each sequence
    void begin(std::map<llama_seq_id, llama_pos> ends);
    // copies the cells that the batch may be placed in
    void before_batch(const llama_batch & batch);
    // after everything from those positions on was removed
    void restore();

  private:
    struct cell {
        cell_place           place;
        std::vector<uint8_t> data;  // K and V of all layers
    };
    using saved_cells = std::map<uint32_t, cell>;  // by row

    const memory_parts &                parts;
    std::map<llama_seq_id, llama_pos>   ends;
    std::map<llama_seq_id, saved_cells> saved;

    void save(llama_seq_id seq_id, llama_pos first, llama_pos last);
};

}  // namespace elastic
