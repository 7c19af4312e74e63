#pragma once

// A sequence as it was at one position, so that what came later can be taken back exactly. Its K and V are copied only when
// a row of them is about to change.

#include "runtime/cache_parts.h"
#include "runtime/kv_layers.h"

#include <map>
#include <vector>

class llama_io_read_i;
class llama_io_write_i;

namespace elastic {

struct checkpoint {
    llama_pos      pos_end = 0;  // position of the next token: a cut here, or from the last cell's on, restores the sequence
    sequence_state state;

    // cells in logical order [n_cells]: where they lay in their stream, and what was known of them
    std::vector<int32_t>    rows;
    std::vector<cell_place> places;
    std::vector<cell_kind>  kinds;
    std::vector<float>      rank_scores;
    cell_importance         scores;
    head_map                counts;
    head_map                bias;

    std::vector<float> logits;  // after the last token [n_vocab], empty where they are not known

    // rows of K and V as they were stored, of the cells that a layer holds [n_layer][bytes]; empty while they lie in the cache
    std::vector<std::vector<uint8_t>> k;
    std::vector<std::vector<uint8_t>> v;

    bool                 is_stored() const { return !k.empty(); }
    bool                 ends_before(llama_pos p) const { return places.back().pos < p; }
    std::vector<int32_t> rows_of_layer(int32_t il) const;            // that the layer holds
    void                 store(int32_t il, const kv_layer & layer);  // K and V of the next layer, as they lie in the cache
    int64_t              n_bytes() const;                            // of everything above

    void              write(llama_io_write_i & io) const;
    static checkpoint read(llama_io_read_i & io, const kv_shape & shape);  // throws std::runtime_error
};

// of each sequence: in order of position, cfg.n_checkpoints at most
class checkpoints {
  public:
    explicit checkpoints(cache_parts & parts) : parts(parts) {}

    // the sequence as it is now. logits: after its last token, or empty
    void take(llama_seq_id seq_id, const std::vector<float> & logits);
    void add(llama_seq_id seq_id, checkpoint ck) { kept[seq_id].push_back(std::move(ck)); }

    // before rows of the sequence change: copies K and V of those that lie in the cache. loaded: the layers of its stream
    void before_change(llama_seq_id seq_id);
    void before_change(llama_seq_id seq_id, const std::vector<kv_layer> & loaded);

    // one that can be restored; nullptr: there is none
    const checkpoint * find(llama_seq_id seq_id, llama_pos pos_end) const;
    const checkpoint * newest(llama_seq_id seq_id) const;
    // the largest position <= p0 that can be restored, 0 if there is none
    llama_pos          last_before(llama_seq_id seq_id, llama_pos p0) const;

    // the sequence becomes what it was at pos_end, where find() found one
    void restore(llama_seq_id seq_id, llama_pos pos_end);

    void forget(llama_seq_id seq_id) { kept.erase(seq_id); }
    void forget_after(llama_seq_id seq_id, llama_pos p0);
    void clear() { kept.clear(); }

    int64_t n_bytes() const;

  private:
    cache_parts &                                   parts;
    std::map<llama_seq_id, std::vector<checkpoint>> kept;

    std::vector<checkpoint *> in_cache(llama_seq_id seq_id);  // those that are not stored
    bool                      can_restore(llama_seq_id seq_id, const checkpoint & ck) const;
    bool                      still_same(llama_seq_id seq_id, const checkpoint & ck, size_t i) const;
    std::vector<uint8_t>      find_unchanged(llama_seq_id seq_id, const checkpoint & ck) const;
    std::vector<int32_t>      place_rows(llama_seq_id seq_id, const checkpoint & ck) const;
    void                      put_back(llama_seq_id seq_id, checkpoint & ck, const std::vector<uint8_t> & unchanged);
    void                      put_scores_back(llama_seq_id seq_id, const checkpoint & ck);
};

}  // namespace elastic
