#pragma once

// The memory of K and V follows the cells in use: rows beyond the last one, and rows masked in single layers, go back to
// the operating system.

#include "runtime/kv_view.h"
#include "runtime/layer_bias.h"

#include <vector>

namespace elastic {

class resident_memory {
  public:
    // enabled: rows are given back at all
    resident_memory(const kv_view & kv, const layer_bias & bias, bool enabled);

    bool is_enabled() const { return enabled; }
    bool frees_layers() const { return enabled && can_free_layers(kv); }  // rows of single layers, too

    static bool can_free_layers(const kv_view & kv);

    // rows up to this one may take memory from now on, as they are written
    void wrote(uint32_t strm, int32_t n_rows);
    // masked rows were written to, all of them perhaps
    void dirtied(uint32_t strm) { dirty[strm] = 1; }

    // before a batch: what was removed since the last one, not every few rows anew, and dirty rows of these sequences
    void before_batch(const std::vector<llama_seq_id> & seq_ids);
    // rows beyond the last one in use, and of these rows the masked ones
    void freed(uint32_t strm, const std::vector<int32_t> & rows);
    void cleared();

    int64_t bytes_released = 0;  // all times together

  private:
    const kv_view &    kv;
    const layer_bias & bias;
    const bool         enabled;

    std::vector<int32_t> n_resident;  // [n_stream]: rows that may take memory
    std::vector<uint8_t> dirty;       // [n_stream]

    void release_tail(uint32_t strm, int32_t n_used);
    void release_masked(uint32_t strm, std::vector<int32_t> rows);
};

}  // namespace elastic
