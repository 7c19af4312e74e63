#pragma once

// What llama_get_memory returns: the memory that llama.cpp made for the model, of whatever kind, and before it the elastic cache of the
// context, which hears of removals, copies, shifts, clears and states, and may refuse a removal before any part has changed. Without an
// elastic cache it only passes on. It is there from the beginning, so that whoever holds the pointer goes through it.

#include "llama-memory.h"

struct llama_context;

namespace elastic {

class elastic_cache;

class watched_memory : public llama_memory_i {
  public:
    explicit watched_memory(llama_memory_i * inner);
    ~watched_memory() override;

    // of a context; nullptr: the model has no memory
    static watched_memory * of(const llama_context & ctx);

    llama_memory_i * inner() const { return memory.get(); }

    // nullptr: none is attached
    elastic_cache * cache() const { return attached.get(); }
    void            set_cache(std::unique_ptr<elastic_cache> value);

    // llama_memory_i

    llama_memory_context_ptr init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) override;
    llama_memory_context_ptr init_full() override { return memory->init_full(); }
    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize) override;

    // callers ask before they remove a range in the middle and move what follows
    bool get_can_shift() const override;

    void clear(bool data) override;

    bool seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) override;
    void seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id) override { memory->seq_keep(seq_id); }
    void seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) override { memory->seq_div(seq_id, p0, p1, d); }

    llama_pos seq_pos_min(llama_seq_id seq_id) const override { return memory->seq_pos_min(seq_id); }
    llama_pos seq_pos_max(llama_seq_id seq_id) const override { return memory->seq_pos_max(seq_id); }

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override { return memory->memory_breakdown(); }

    // the block of the elastic cache follows that of the memory
    void state_write(llama_io_write_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) const override;
    void state_read(llama_io_read_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) override;

  private:
    llama_memory_ptr               memory;
    std::unique_ptr<elastic_cache> attached;         // refers to the memory: goes first
    bool                           retries = false;  // the next batch is the last one again
};

}  // namespace elastic
