#pragma once

// The attention that the last queries of each sequence's prompt paid, query by query, as long as the prompt is not compressed. Of a
// sequence, not of a stream: what others decode leaves it as it is.

#include "runtime/lazy_map.h"

#include "llama.h"

#include <deque>
#include <map>
#include <memory>
#include <vector>

namespace elastic {

class query_windows {
  public:
    // n_window: queries of each sequence; 0: none is kept
    query_windows(int32_t n_layer, int32_t n_head_kv, int32_t kv_size, int32_t n_window);

    const int32_t n_window;

    bool any() const { return n_window > 0; }

    // room for one more query; the oldest one leaves
    void    begin_query(llama_seq_id seq_id);
    // what the query `ago` paid to the cells of the stream  [kv_size]
    float * row(llama_seq_id seq_id, int32_t ago, int32_t il, int32_t ih);
    // another token has the cell
    void    reset_cell(llama_seq_id seq_id, int32_t cell);

    void copy(llama_seq_id seq_id_src, llama_seq_id seq_id_dst);  // whose cells have the same rows
    void forget(llama_seq_id seq_id) { windows.erase(seq_id); }
    void clear() { windows.clear(); }

    // the sum over the queries, the oldest first, of some cells; no cells where no window is kept
    head_map sum(llama_seq_id seq_id, const std::vector<int32_t> & rows) const;

    // one by one, the newest first, and back exactly
    std::vector<head_map> gather(llama_seq_id seq_id, const std::vector<int32_t> & rows) const;
    void                  set(llama_seq_id seq_id, const std::vector<int32_t> & rows, const std::vector<head_map> & queries);

  private:
    // copies of a sequence have queries in common
    using query = std::shared_ptr<lazy_map>;

    const int32_t n_layer;
    const int32_t n_head_kv;
    const int32_t kv_size;

    std::map<llama_seq_id, std::deque<query>> windows;  // the newest first, n_window at most

    int32_t  n_rows() const { return n_layer * n_head_kv; }
    query    make() const { return std::make_shared<lazy_map>(n_rows(), kv_size); }
    head_map take(const query & from, const std::vector<int32_t> & rows) const;
};

}  // namespace elastic
