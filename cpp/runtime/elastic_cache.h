#pragma once

// The elastic cache of one llama_context: recognises the stages inside decode, accumulates importance over the
// ubatches of a prompt, compresses it once when the first token after it arrives, and lets cells leave while
// generating. The only part of the library that touches llama.cpp's internals.

#include "runtime/cell_store.h"
#include "runtime/checkpoint.h"
#include "runtime/elastic.h"

#include "core/plan.h"

#include "llama-elastic.h"

#include <map>
#include <memory>

struct llama_context;

namespace elastic {

// thrown when the model's memory cannot be compressed
struct unsupported : std::runtime_error {
    using std::runtime_error::runtime_error;
};

config make_config(const elastic_params & params);  // throws elastic::error

struct cell_info {
    int32_t   index;  // in its stream
    llama_pos pos;
    cell_kind kind;
};

// one layer of a sequence as f32, as stored (after RoPE)
struct kv_values {
    int32_t            n_cells;
    int32_t            n_head_kv;
    int32_t            n_embd_head_k;
    int32_t            n_embd_head_v;
    std::vector<float> k;  // [n_cells][n_head_kv][n_embd_head_k]
    std::vector<float> v;  // [n_cells][n_head_kv][n_embd_head_v]
};

// of the logits and of the stored bias, and how V lies
struct attention_scales {
    float logits;
    float bias;
    bool  v_trans;
};

class elastic_cache : public llama_elastic_i {
  public:
    elastic_cache(llama_context & ctx, const config & cfg);
    ~elastic_cache() override;

    // llama_elastic_i

    bool          want_sums(const llama_ubatch & ubatch) const override;
    bool          sums_prompts() const override { return active() && store->has_mass(); }
    uint32_t      n_sum_rows(const llama_ubatch & ubatch) const override;
    void          set_sum_weights(float * dst, const llama_ubatch & ubatch, int64_t n_head, int64_t n_stream) const override;
    ggml_tensor * build_attn(ggml_context * ctx0, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_mask,
                             ggml_tensor * sum_weights, ggml_tensor * bias, float kq_scale) const override;
    bool          has_bias() const override { return store->any_bias(); }
    bool          mask_per_head() const override { return masks_heads; }
    ggml_tensor * get_bias(int32_t il) const override { return store->bias_tensor(il); }
    float         bias_scale() const override { return store->bias_scale(); }

    void on_batch(const llama_batch & batch) override;
    void on_placed(const llama_ubatch & ubatch, const llama_memory_context_i * mctx) override;
    void on_computed(const llama_ubatch & ubatch, const llama_memory_context_i * mctx, const llm_graph_result * res) override;

    bool on_seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) override;
    void on_seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override;
    void on_seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) override;
    void on_clear() override;
    void clear_buffer(ggml_backend_buffer_t buffer) override;

    uint32_t v_stride() const override { return (uint32_t) stride_v; }
    void     on_restored(llama_seq_id seq_id) override;

    void state_write(llama_io_write_i & io, llama_seq_id seq_id) const override;
    void state_read(llama_io_read_i & io, llama_seq_id seq_id) override;

    // callers' side

    bool frees_rows() const;  // of single layers

    void check_layers(const config & other) const;  // throws elastic::error if it has shares for another number of them

    void set_hold(bool value) { hold = value; }

    // K and V as llama.cpp stores them, before it goes on without this cache
    void restore_layout();

    // compresses the prompt of a sequence now; returns the cells it holds after. throws elastic::error,
    // and then the cache is as it was
    int32_t compress(llama_seq_id seq_id);

    // gives all layers of a sequence as many cells, on average as many as before, so that it takes no more places than those
    int32_t level(llama_seq_id seq_id);

    // before n_new tokens are decoded that find no free cells: compresses what waits, what an answer holds beyond the budget, and
    // levels, as far as that is needed; returns the cells that the sequence holds after
    int32_t free_cells(llama_seq_id seq_id, int32_t n_new);

    // tries answers and takes them back, see elastic_look_ahead; returns the steps. throws elastic::error before anything is tried
    int32_t look_ahead(const std::vector<llama_seq_id> & seq_ids, const std::vector<llama_token> & tokens);

    // The largest position <= p0 from which on everything can be removed, so that what follows is as if it had never been
    // decoded. 0: only all of it
    llama_pos can_cut(llama_seq_id seq_id, llama_pos p0) const;
    // the logits after the sequence's last token, which is the last one of a prompt, are those of the context again; false: not known
    bool      restore_logits(llama_seq_id seq_id);
    int64_t   checkpoint_bytes() const;

    // Removes the end of a prompt that is not compressed yet, but what its tokens looked at stays part of the importance: they stood in
    // for what is still to come. throws elastic::error
    void take_back(llama_seq_id seq_id, llama_pos p0);

    int32_t        n_cells(llama_seq_id seq_id) const;
    int32_t        n_held(llama_seq_id seq_id) const;        // rows of a layer on average, rounded up: cells, where all layers hold all
    int64_t        kv_bytes(llama_seq_id seq_id) const;      // K, V and bias of what its layers hold
    void           check_seq_id(llama_seq_id seq_id) const;  // throws elastic::error out of [0, n_seq_max)
    sequence_state sequence(llama_seq_id seq_id) const;
    bool           empty() const;
    bool           is_waiting(llama_seq_id seq_id) const;  // an answer has begun whose prompt is still to be compressed
    int64_t        cell_bytes() const { return shape.cell_bytes + store->bias_bytes_per_cell(); }

    // for tests and pictures (inspect.cpp); in order of position
    std::vector<cell_info>        describe_cells(llama_seq_id seq_id) const;
    kv_values                     read_kv(llama_seq_id seq_id, int32_t il) const;  // throws elastic::error out of range
    std::vector<int32_t>          logical_cells(llama_seq_id seq_id) const;        // cell indices in order of position
    cell_state                    gather(llama_seq_id seq_id) const;
    std::pair<head_map, head_map> gather_recent(llama_seq_id seq_id) const;  // decaying, windowed
    std::vector<int32_t>          held_rows(llama_seq_id seq_id) const;      // cells that each layer holds
    const plan &                  last_plan() const { return plan_last; }

    elastic_stats stats = {};
    const config  cfg;

  private:
    llama_context &             ctx;
    llama_kv_cache &            kv;
    kv_shape                    shape;
    std::unique_ptr<cell_store> store;

    bool hold        = false;
    bool taking_back = false;
    bool trying      = false;  // an answer, see look_ahead
    bool on_host     = false;  // all of K and V
    bool own_attn    = false;  // what is scored goes through an op of our own
    bool masks_heads;          // where they lie, the fused op takes a mask per head
    bool score_step = false;   // the current batch generates, and its attention is added to the scores

    mutable std::map<float, attention_scales> attn_scales;  // by that of the logits

    std::map<llama_seq_id, sequence_state> seqs;
    std::map<llama_seq_id, bool>           in_prompt;  // stage of each sequence in the current batch
    plan                                   plan_last;

    // in order of position, cfg.n_checkpoints at most; saving a state copies the rows of the newest
    mutable std::map<llama_seq_id, std::vector<checkpoint>> checkpoints;

    // logits of a prompt's last token: where the batch that has just been decoded holds them, and those that were taken from one
    struct prompt_end {
        llama_pos          pos_end;
        std::vector<float> logits;
    };
    struct output_row {
        llama_seq_id seq_id;
        llama_pos    pos_end;
        int32_t      index;  // in the batch
    };
    std::map<llama_seq_id, prompt_end> prompt_ends;
    std::vector<output_row>            outputs;
    int32_t                            n_to_compute = 0;  // tokens of the batch whose results are not there yet

    std::vector<int32_t> n_touched;    // [n_stream]: rows of K that may take memory
    std::vector<uint8_t> refilled;     // [n_stream]: rows that layers do without were written to
    std::vector<int32_t> n_touched_v;  // and of V, or the stride up to which V may

    bool    moves_v  = false;  // V is transposed, and its stride follows the cells in use
    int32_t stride_v = 0;
    bool    spare_v  = false;  // the stride is larger than it needs to be

    bool           active() const;
    bool           releases() const { return cfg.release_memory && active(); }
    int32_t        target_cells(int64_t n_tokens) const;
    bool           is_prompt(llama_seq_id seq_id) const;
    bool           is_scored(llama_seq_id seq_id) const;
    bool           any_scored(const llama_ubatch & ubatch) const;
    bool           fades(const llama_ubatch & ubatch) const;
    int32_t        query_count(llama_seq_id seq_id) const;
    void           make_room(llama_seq_id seq_id, int32_t n_new);
    int32_t        room_under_cap(llama_seq_id seq_id) const;
    void           make_room_for_prompt(llama_seq_id seq_id, int32_t n_new);
    void           make_room_by_merging(llama_seq_id seq_id, int32_t allowed, int32_t n_new);
    int32_t        compress_to(llama_seq_id seq_id, int32_t n_target, bool answer_next, bool level = false);
    int32_t        n_threads() const;
    int32_t        n_used_max() const;  // of the streams
    int32_t        stride_for(int32_t n_cells) const;
    int32_t        min_stride() const;
    void           set_v_stride(int32_t to);
    void           grow_v(bool in_prompt);
    void           shrink_v();
    void           note_touched(uint32_t strm, int32_t n_rows);
    int32_t        n_used(uint32_t strm) const;
    void           release_rows(uint32_t strm, int32_t n_used);
    void           release_v(uint32_t strm, int32_t n_used);
    int32_t        n_generated(llama_seq_id seq_id) const;
    int32_t        n_to_try(llama_seq_id seq_id, int32_t n_seqs) const;
    bool           waits(llama_seq_id seq_id, int32_t n_new) const;
    void           compress_pending(llama_seq_id seq_id);
    void           merge_overdraft_cells(llama_seq_id seq_id, int32_t n_new);
    elastic::cells describe(llama_seq_id seq_id, const std::vector<int32_t> & rows) const;
    void           let_leave(llama_seq_id seq_id);
    void           let_leave_per_head(llama_seq_id seq_id, const std::vector<int32_t> & rows, const elastic::cells & c,
                                      const std::vector<float> & total);
    void           move_rows(uint32_t strm, int32_t il, int32_t from, const std::vector<int32_t> & to);
    void           fade_recent(const llama_ubatch & ubatch, uint32_t strm, int64_t first, int64_t n);
    void           commit(llama_seq_id seq_id, const plan & p, const std::vector<int32_t> & src, const std::vector<int32_t> & dst);
    bool           is_shared(uint32_t strm, int32_t cell) const;

    void                 take_logits();
    void                 note_outputs(const llama_batch & batch);
    void                 take_checkpoint(llama_seq_id seq_id);
    void                 store_checkpoints(llama_seq_id seq_id) const;  // before rows of the sequence change
    void                 store_rows(llama_seq_id seq_id, checkpoint & ck) const;
    const checkpoint *   find_checkpoint(llama_seq_id seq_id, llama_pos pos_end) const;
    bool                 can_restore(llama_seq_id seq_id, const checkpoint & ck) const;
    void                 restore(llama_seq_id seq_id, llama_pos pos_end);
    std::vector<int32_t> place_rows(llama_seq_id seq_id, const checkpoint & ck) const;
    void                 note_change(llama_seq_id seq_id, llama_pos pos, bool moved);

    std::vector<int32_t> held_rows(uint32_t strm, const std::vector<int32_t> & rows) const;
    static int32_t       average(const std::vector<int32_t> & held);  // over the layers, rounded up
    void                 release_absent(uint32_t strm, const std::vector<int32_t> & rows);
    void                 release_refilled();
    void                 let_leave_one_layer(uint32_t strm, int32_t il, const std::vector<int32_t> & may_leave);

    std::vector<int32_t> own_cells(llama_seq_id seq_id) const;  // logical cells that no other sequence uses
};

}  // namespace elastic
