#pragma once

// What llama-server asks of the elastic cache of its slots. `Slot` is server_slot: a sequence, the tokens and images that it has read
// (prompt.tokens) and those that it is to read (task->tokens).

#include "elastic_options.h"
#include "runtime/elastic.h"

#include <algorithm>
#include <cstdint>

// in place of an index into a batch (server_slot::i_batch): the logits are those that the context was given
static constexpr int32_t ELASTIC_NO_BATCH = INT32_MAX - 1;

// How many of the first n tokens a slot can go on from, as if the others had never been decoded. An image stays whole or goes.
template <typename Tokens> int32_t elastic_reusable(const llama_context * ctx, llama_seq_id seq_id, const Tokens & tokens, int32_t n) {
    while (n > 0) {
        const llama_pos cut = elastic_can_cut(ctx, seq_id, tokens.pos_next(n));
        if (cut == tokens.pos_next(n)) {
            return n;
        }
        while (n > 0 && tokens.pos_next(n) > cut) {
            --n;
        }
        // inside an image all positions are those of its end
    }
    return 0;
}

// A slot that has read exactly this prompt before, and answered: the answer is taken back, and the logits of the prompt's last token are
// the context's again, at index 0
inline bool elastic_back_to_end(llama_context * ctx, llama_seq_id seq_id, llama_pos pos_end) {
    return elastic_can_cut(ctx, seq_id, pos_end) == pos_end && llama_memory_seq_rm(llama_get_memory(ctx), seq_id, pos_end, -1) &&
           elastic_restore_logits(ctx, seq_id) == 0;
}

// A prompt begins, and the first n_past tokens are those that the slot has read. Returns how many it goes on from: at least one is left,
// as llama-server wants it. Where all of them were read and the logits of the last one are there again, i_batch says so
template <typename Slot> int32_t elastic_begin_prompt(llama_context * ctx, Slot & slot, int32_t n_past) {
    if (!elastic_is_attached(ctx)) {
        return n_past;
    }
    const int32_t n_tokens    = slot.task->n_tokens();
    // one whose first token is sampled by the graph needs a batch, and so do the slots that wait for this one
    const bool    needs_batch = !slot.task->need_sampling() || slot.task->is_parent() || slot.task->params.sampling.backend_sampling;
    if (n_past == n_tokens && !needs_batch && elastic_back_to_end(ctx, slot.id, slot.prompt.tokens.pos_next(n_past))) {
        slot.i_batch = ELASTIC_NO_BATCH;
        return n_tokens - 1;
    }
    return elastic_reusable(ctx, slot.id, slot.prompt.tokens, std::min(n_past, n_tokens - 1));
}

// whether that holds still, and nothing is to be decoded
template <typename Slot> bool elastic_starts_from_logits(Slot & slot) {
    if (slot.i_batch == ELASTIC_NO_BATCH && slot.prompt.n_tokens() != slot.task->n_tokens() - 1) {
        slot.i_batch = -1;
    }
    return slot.i_batch == ELASTIC_NO_BATCH;
}

// the last image of the slot's prompt was read
inline void elastic_end_media(llama_context * ctx, llama_seq_id seq_id) {
    if (elastic_has_image_checkpoint()) {
        elastic_compress(ctx, seq_id);
    }
}
