#pragma once

// The elastic cache of one llama_context: recognises the stages inside decode, accumulates importance over the ubatches of a prompt,
// compresses it once when the first token after it arrives, and makes room while generating. Only passes on what llama.cpp tells it;
// the parts do the work.

#include "runtime/attention_graph.h"
#include "runtime/cache_parts.h"
#include "runtime/checkpoint.h"
#include "runtime/make_room.h"
#include "runtime/prompt_logits.h"
#include "runtime/window_backup.h"

#include "runtime/llama-elastic.h"

namespace elastic {

class elastic_cache : public llama_elastic_i {
  public:
    elastic_cache(llama_context & ctx, const config & cfg);

    // llama_elastic_i

    ggml_tensor * build_attn(const llm_graph_context & graph, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_b,
                             ggml_tensor * kq_mask, ggml_tensor * sinks, float kq_scale, int32_t il) override;

    uint32_t n_graph_nodes(uint32_t n_tokens) const override;

    void on_placed(const llama_ubatch & ubatch, const llama_memory_context_i & mctx) override;
    void on_computed(const llama_ubatch & ubatch, const llama_memory_context_i & mctx, const llm_graph_result & graph) override;

    // of watched_memory. Positions: 0 <= p0 <= p1

    // a batch was accepted, its tokens have no cells yet; does not throw
    void on_batch(const llama_batch & batch);

    // false: the removal is refused. on_seq_rm: it is not, and comes next
    bool can_seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;
    void on_seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1);
    void on_seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst);
    void on_seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift);
    void on_clear();
    void forget(llama_seq_id seq_id);  // its cells are gone, or others

    // what follows the state of the memory; seq_id -1: all sequences
    void state_write(llama_io_write_i & io, llama_seq_id seq_id);
    void state_read(llama_io_read_i & io, llama_seq_id seq_id);
    void on_load_failed();

    // callers' side. sequences are checked: elastic::error out of [0, n_seq_max)

    const cache_parts & parts() const { return state; }
    cache_parts &       parts() { return state; }
    room_maker &        room() { return rooms; }
    const plan &        last_plan() const { return rooms.last_plan(); }
    checkpoints &       kept() { return taken; }

    // While set, batches of one token are part of a prompt.
    void set_prefill(bool value) { state.seqs.set_prefill(value); }

    // What is decoded between the two is taken back, but what its tokens attended to stays part of the importance of the prompts that
    // are there. begin_probe throws elastic::error if one is running
    void begin_probe();
    void end_probe();
    // whether what is decoded can be taken back
    bool can_probe() const;

    // The largest position <= p0 from which on everything can be removed, so that what follows is as if it had never been
    // decoded. 0: only all of it
    llama_pos can_cut(llama_seq_id seq_id, llama_pos p0) const;
    // the logits after the sequence's last token, which is the last one of a prompt, are those of the context again; false: not known
    bool      restore_logits(llama_seq_id seq_id);

    bool                               empty() const { return state.kv.empty(); }
    bool                               has_bias() const { return state.bias.any(); }
    elastic_stats                      stats() const;
    void                               reset_stats();
    const std::vector<attention_way> & layer_ways() const { return graph.layer_ways(); }
    int64_t                            cell_bytes() const { return state.kv.shape.cell_bytes + state.bias.bytes_per_cell(); }

  private:
    llama_context & ctx;
    cache_parts     state;
    checkpoints     taken;
    prompt_logits   logits;
    attention_graph graph;
    room_maker      rooms;
    window_backup   window;  // while a probe runs

    struct probe {
        bool                              was_prefill;
        std::map<llama_seq_id, llama_pos> ends;  // of the prompts, before it
    };
    std::unique_ptr<probe> probing;
    bool                   taking_back = false;

    struct removal {
        llama_seq_id seq_id;
        int32_t      n_cells;
        bool         all;
        bool         to_checkpoint;
    };
    bool find_removals(llama_seq_id seq_id, llama_pos p0, llama_pos p1, std::vector<removal> & res) const;
    bool find_removal(llama_seq_id seq_id, llama_pos p0, llama_pos p1, std::vector<removal> & res) const;
    void remove(const removal & r, llama_pos p0, llama_pos p1);
    void begin_part(const batch_part & part, int32_t n_batch);
    void forget_all();
};

}  // namespace elastic
