#pragma once

// What llama-server asks of the elastic cache of its slots. `tokens` are a slot's: tokens and images.

#include "runtime/elastic.h"

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
    return elastic_is_attached(ctx) && elastic_can_cut(ctx, seq_id, pos_end) == pos_end &&
           llama_memory_seq_rm(llama_get_memory(ctx), seq_id, pos_end, -1) && elastic_restore_logits(ctx, seq_id) == 0;
}

// what /metrics says of the elastic cache
struct elastic_metrics {
    bool          is_on    = false;
    int64_t       n_tokens = 0;  // seen by the sequences of the slots
    int64_t       n_cells  = 0;  // that they take, on average over the layers
    elastic_stats stats    = {};
};

inline elastic_metrics elastic_collect(const llama_context * ctx, int32_t n_slots) {
    elastic_metrics res;
    if (!elastic_is_attached(ctx)) {
        return res;
    }
    res.is_on = true;
    res.stats = elastic_get_stats(ctx);
    for (llama_seq_id id = 0; id < n_slots; ++id) {
        res.n_tokens += elastic_n_tokens(ctx, id);
        res.n_cells += elastic_n_per_layer(ctx, id);
    }
    return res;
}

// calls add(type, name, description, value)
template <typename Add> void elastic_each_metric(const elastic_metrics & m, const Add & add) {
    if (!m.is_on) {
        return;
    }
    add("counter", "kv_compressions_total", "Elastic KV cache: prompts compressed", (double) m.stats.n_compressions);
    add("counter", "kv_evictions_total", "Elastic KV cache: cells evicted while generating", (double) m.stats.n_evictions);
    add("counter", "kv_released_bytes_total", "Elastic KV cache: bytes of K and V given back to the operating system",
        (double) m.stats.n_bytes_released);
    add("gauge", "kv_tokens", "Elastic KV cache: tokens seen by the sequences of the slots", (double) m.n_tokens);
    add("gauge", "kv_cells", "Elastic KV cache: cells that these take", (double) m.n_cells);
    add("gauge", "kv_checkpoint_bytes", "Elastic KV cache: bytes of checkpoints", (double) m.stats.n_bytes_checkpoints);
}
