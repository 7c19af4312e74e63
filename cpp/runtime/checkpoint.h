#pragma once

// A sequence as it was at one position, so that what came later can be taken back exactly. Its K and V are copied only when
// a row of them is about to change.

#include "runtime/cache_parts.h"
#include "runtime/packed_map.h"
#include "runtime/stored_rows.h"

#include <functional>
#include <map>
#include <memory>
#include <vector>

class llama_io_read_i;
class llama_io_write_i;

namespace elastic {

// what is known of the cells of a checkpoint, per layer and head
struct checkpoint_maps {
    cell_importance scores;
    head_map        counts;
    head_map        bias;

    std::vector<head_map *> all();  // in the order of checkpoint::maps and of saved states
};

struct checkpoint {
    llama_pos      pos_end = 0;  // position of the next token: a cut here, or from the last cell's on, restores the sequence
    sequence_state state;

    // cells in logical order [n_cells]: where they lay in their stream, and what was known of them
    std::vector<int32_t>    rows;
    std::vector<cell_place> places;
    std::vector<cell_kind>  kinds;
    std::vector<float>      rank_scores;
    std::vector<bool>       masked;  // [n_layer][n_cells], empty where none is
    std::vector<packed_map> maps;    // importance, counts and bias, see checkpoint_maps

    std::vector<float> logits;  // after the last token [n_vocab], empty where they are not known

    // K and V once rows have changed, which checkpoints have in common; null while they lie in the cache
    std::shared_ptr<const stored_rows> stored;
    std::vector<int32_t>               stored_at;  // row of each cell there [n_cells]

    bool    is_stored() const { return stored != nullptr; }
    bool    ends_before(llama_pos p) const { return places.back().pos < p; }
    int64_t n_bytes() const;  // of everything above but K and V

    void            pack(checkpoint_maps & of_cells);
    checkpoint_maps unpack() const;

    bool                 holds(int32_t il, size_t cell) const { return masked.empty() || !masked[il * rows.size() + cell]; }
    // of `cells`, those that the layer holds
    std::vector<int32_t> of_layer(int32_t il, const std::vector<int32_t> & cells) const;
    std::vector<int32_t> rows_of_layer(int32_t il) const { return of_layer(il, rows); }
    // K and V of the cells that the layer holds, from where they are now
    layer_bytes          bytes_of_layer(int32_t il, const kv_view & kv, uint32_t strm) const;

    void              write(llama_io_write_i & io, const kv_view & kv, uint32_t strm) const;
    static checkpoint read(llama_io_read_i & io, const kv_view & kv);  // throws std::runtime_error
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
    void               write(const checkpoint & ck, llama_io_write_i & io, llama_seq_id seq_id) const;
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

    bool                 can_restore(llama_seq_id seq_id, const checkpoint & ck) const;
    bool                 still_same(llama_seq_id seq_id, const checkpoint & ck, size_t i) const;
    std::vector<uint8_t> find_unchanged(llama_seq_id seq_id, const checkpoint & ck) const;
    std::vector<int32_t> place_rows(llama_seq_id seq_id, const checkpoint & ck) const;
    void                 put_back(llama_seq_id seq_id, checkpoint & ck, const std::vector<uint8_t> & unchanged);
    void                 put_scores_back(llama_seq_id seq_id, const checkpoint & ck);
    // the cache's rows that checkpoints of the sequence go by, and that the layer holds; ascending
    std::vector<int32_t> rows_to_store(llama_seq_id seq_id, int32_t il) const;
    bool                 lies_in_cache(llama_seq_id seq_id) const;  // some checkpoint's K and V
    void                 store(llama_seq_id seq_id, const std::function<layer_bytes(int32_t, const std::vector<int32_t> &)> & read);
};

}  // namespace elastic
