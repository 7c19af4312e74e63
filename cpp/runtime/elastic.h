#pragma once

// C interface of the elastic KV cache, exported by libllama. Works for any caller of llama_decode:
// the stages (prompt, generation) are recognised inside it.

#include "llama.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum elastic_layers {
    ELASTIC_LAYERS_EVEN,   // all keep as many
    ELASTIC_LAYERS_GIVEN,  // as layer_share says; for policies that can, without max_cells
    ELASTIC_LAYERS_AUTO,   // more where words are looked up, if the policy can and memory follows: rows of single layers go back to the
                           // operating system. As layer_share says, or measured once for each model (elastic_measure_layers)
};

struct elastic_params {
    const char * policy;     // a row of the policy table, e.g. "elastic"
    double       budget;     // <= 1: fraction of the tokens seen that stay as cells; > 1: a number of cells. Up to four of
                             // them stay free for the answer, unless the prompt ends with an image (policy "elastic")
    int32_t      n_sink;     // first cells that always stay, >= 0
    int32_t      offset;     // evictor "distance": cells between the evicted one and the end of the prompt
    int32_t      min_cells;  // a sequence with fewer cells is left alone
    int32_t      n_threads;  // for plan and merge; 0: the context's batch threads
    int32_t max_cells;  // a sequence never holds more cells than these and one ubatch (or one batch, where it is larger); 0: no such cap
    int32_t overdraft;  // cells beyond the budget that an answer may take before it is compressed too (policy "elastic"); with max_cells
                        // they are a part of those; -1: what the policy is made for (32), on a device as many as the budget has, while as
                        // many stay free
    int32_t n_checkpoints;  // states of a sequence that are kept so that what came later can be taken back: before its last prompt and
                            // after the prompt's compression. Each takes as much memory as the sequence did then, once that has
                            // changed; what several have in common is stored once. 0: none, and a compressed sequence can only be removed
                            // as a whole
    enum elastic_layers layers;          // how many cells the layers keep in relation to each other, while the budget holds on average
    const float *       layer_share;     // of each layer of the cache in relation to the others, > 0; NULL: see layers
    int32_t             n_layer_share;   // their number, that of the layers of the cache, or 0
    bool                record;          // keep every score that any policy looks at, so that a saved prompt can be loaded under each
    bool                release_memory;  // rows that are not in use go back to the operating system (CPU buffers, Linux)
    int32_t n_question;  // cells of the budget that elastic_compress leaves free where a prompt ends with an image, so that its question
                         // need not be compressed with it; a fifth of the budget at most. 0: none
};

struct elastic_stats {
    int64_t n_compressions;  // prompts compressed
    int64_t n_evictions;     // cells evicted while generating
    int64_t n_cells_before;  // cells of the last compressed prompt, before; on average over the layers
    int64_t n_cells_after;   // and after
    int64_t n_bytes_before;  // K, V and bias bytes of those cells
    int64_t n_bytes_after;
    int64_t n_bytes_released;  // K and V given back to the operating system, all times together; rows masked in single layers
                               // count at each compression
    int64_t t_score_us;        // reading and accumulating importance
    int64_t t_plan_us;
    int64_t t_merge_us;
    int64_t n_bytes_checkpoints;  // that checkpoints take now
    int64_t n_bytes_other;        // what the sequence of the last compressed prompt held then in windows and recurrent states,
                                  // which are left alone; not in n_bytes_before and n_bytes_after
};

// The memory of a context. Where the model has sliding windows or recurrent layers, the elastic cache works on the layers that attend to
// everything, and leaves the rest alone: a window holds n_swa + n_ubatch cells, or with swa_full as many as the context, used or not.
struct elastic_memory {
    char    kind[32];       // "plain", "sliding window", "hybrid" or "hybrid, sliding window"
    int32_t n_layer_model;  // layers of the model
    int32_t n_layer;        // layers of the part that is compressed
    int64_t cell_bytes;     // K and V of one cell of that part, all its layers
    int64_t other_bytes;    // allocated by the part that is left alone: K and V of windows, recurrent states
    int32_t other_cells;    // cells of the windows, of all sequences; without windows, those of the recurrent part
    bool    recurrent;      // it has a state that cannot be taken back: no probes, no cuts, no checkpoints
};

LLAMA_API struct elastic_params elastic_default_params(void);

// What the elastic cache would work on; none needs to be attached.
//   returns 0, or -2: memory type not supported, the reason is in elastic_last_error()
LLAMA_API int32_t elastic_get_memory(const struct llama_context * ctx, struct elastic_memory * memory);

// Whether the K and V buffers of contexts that this thread makes from now on are left untouched until they are used (Linux, CPU), so
// that a long context takes no memory before. Off at the start: llama.cpp writes zeros to all of them.
LLAMA_API void elastic_lazy_buffers(bool value);

// Switches the elastic cache on for a context. On an error nothing changes; the reason is in
// elastic_last_error(). Attaching again replaces the parameters; the cache must be empty then.
//   returns 0, or -1: bad parameter, -2: memory type not supported, -3: cache not empty
// max_cells needs a window part of n_swa + n_ubatch cells, which it has where n_ctx is no smaller than that.
LLAMA_API int32_t elastic_attach(struct llama_context * ctx, const struct elastic_params * params);

// How much each layer of the cache looks words up, by which ELASTIC_LAYERS_AUTO gives them cells: in [0, 1]. Takes a context of its own,
// a prompt of 56 tokens and 32 steps.
//   scores [n]: of the layers of the cache; n: room for so many
//   returns the number of layers, or a negative code as above
LLAMA_API int32_t elastic_measure_layers(struct llama_model * model, int32_t n_threads, float * scores, int32_t n);

// Switches it off and frees its memory. The cache must be cleared first when it holds biased cells
// (returns -3 otherwise). Call before llama_free, or not at all: llama_free detaches too.
LLAMA_API int32_t elastic_detach(struct llama_context * ctx);

LLAMA_API bool elastic_is_attached(const struct llama_context * ctx);

// While set, batches of one token are part of a prompt: nothing is evicted, and compressed only for max_cells. For callers that feed
// a prompt in pieces of which some are a single token with logits.
LLAMA_API void elastic_set_prefill(struct llama_context * ctx, bool value);

// Compresses the prompt of a sequence now instead of at its first generated token.
//   returns the cells it takes after (elastic_n_cells), or a negative code as above
LLAMA_API int32_t elastic_compress(struct llama_context * ctx, llama_seq_id seq_id);

// Compresses a prompt that other prompts are going to begin with, such as that of an image before its question is known, by a budget of
// its own (as elastic_params.budget). Its state can be saved then (llama_state_seq_get_data).
//   returns the cells it takes after, or a negative code as above
LLAMA_API int32_t elastic_compress_prefix(struct llama_context * ctx, llama_seq_id seq_id, double budget);

// Gives all layers of a sequence as many cells, on average as many as before; with layer_share it takes fewer slots then.
//   returns the cells it takes after, or a negative code as above
LLAMA_API int32_t elastic_equalize_layers(struct llama_context * ctx, llama_seq_id seq_id);

// Where n_new more tokens find no free cells: compresses what an answer holds beyond the budget, and equalizes the layers, as far as
// needed. llama_decode does so itself before it places a batch.
//   returns the cells the sequence takes after, or a negative code as above
LLAMA_API int32_t elastic_make_room(struct llama_context * ctx, llama_seq_id seq_id, int32_t n_new);

// A probe: what is decoded between the two is taken back, as if it had never been decoded, but what its tokens attended to stays part
// of the importance. Between a prompt and its answer, a few likely tokens of the answer say what it is going to look at:
//
//   elastic_begin_probe(ctx);
//   for (int i = 0; i < 16; ++i) { llama_decode(ctx, batch_of(token)); token = most_likely(ctx); }
//   elastic_end_probe(ctx);
//
// elastic_n_to_drop: cells of the sequence's own that the compression of its prompt is going to drop or merge, 0 if it has been
// elastic_can_probe: whether what is decoded can be taken back; not where a part of the memory is recurrent
//   elastic_begin_probe returns 0, or -1: none is attached, a probe is running, or there can be none
LLAMA_API bool    elastic_can_probe(const struct llama_context * ctx);
LLAMA_API int32_t elastic_begin_probe(struct llama_context * ctx);
LLAMA_API void    elastic_end_probe(struct llama_context * ctx);
LLAMA_API int32_t elastic_n_to_drop(const struct llama_context * ctx, llama_seq_id seq_id);

// Cells the sequence takes of the context now: with layer_share as many as the layer that holds most. Cells per layer, on
// average, rounded up. Tokens it has seen (decoded since it was last empty); 0 where nothing is ever dropped (budget 1, policy "full"):
// such a cache takes no part in decoding, so it counts none
LLAMA_API int32_t elastic_n_cells(const struct llama_context * ctx, llama_seq_id seq_id);
LLAMA_API int32_t elastic_n_per_layer(const struct llama_context * ctx, llama_seq_id seq_id);
LLAMA_API int64_t elastic_n_tokens(const struct llama_context * ctx, llama_seq_id seq_id);

// Tokens that find a cell now, in the part of the memory that has fewest. Position of the sequence's next token: behind an image of a
// model with M-RoPE its height and width count. Either works without an elastic cache; -2 for a memory that is not supported
LLAMA_API int32_t   elastic_n_free(const struct llama_context * ctx, llama_seq_id seq_id);
LLAMA_API llama_pos elastic_next_pos(const struct llama_context * ctx, llama_seq_id seq_id);

// llama_memory_seq_rm(mem, seq_id, p0, -1) works, and what follows is as if the tokens from p0 on had never been decoded, where p0 is
// what this returns: the largest such position that is not above the one given. 0: only the whole sequence can be removed, and its
// history has to be decoded again. Without an elastic cache every position is such a one
LLAMA_API llama_pos elastic_can_cut(const struct llama_context * ctx, llama_seq_id seq_id, llama_pos p0);

// After such a cut at the end of a prompt: the logits of its last token become those of the context (llama_get_logits_ith with 0 or
// -1). To decode the token again would not give them, since it saw cells that are merged by now.
//   returns 0, or -1: they are not known
LLAMA_API int32_t elastic_restore_logits(struct llama_context * ctx, llama_seq_id seq_id);

LLAMA_API struct elastic_stats elastic_get_stats(const struct llama_context * ctx);
LLAMA_API void                 elastic_reset_stats(struct llama_context * ctx);

// text of the last error on this thread, "" if none
LLAMA_API const char * elastic_last_error(void);

#ifdef __cplusplus
}
#endif
