#include "elastic_metrics.h"

#include "runtime/elastic.h"

#include <mutex>

static struct {
    std::mutex    mutex;
    bool          is_on    = false;
    int64_t       n_tokens = 0;  // seen by the sequences of the slots
    int64_t       n_cells  = 0;  // that they take, on average over the layers
    elastic_stats stats    = {};
} taken;

void elastic_update_metrics(const llama_context * ctx, int32_t n_slots) {
    if (!elastic_is_attached(ctx)) {
        return;
    }
    int64_t n_tokens = 0;
    int64_t n_cells  = 0;
    for (llama_seq_id id = 0; id < n_slots; ++id) {
        n_tokens += elastic_n_tokens(ctx, id);
        n_cells += elastic_n_per_layer(ctx, id);
    }
    std::lock_guard<std::mutex> lock(taken.mutex);
    taken.is_on    = true;
    taken.n_tokens = n_tokens;
    taken.n_cells  = n_cells;
    taken.stats    = elastic_get_stats(ctx);
}

void elastic_each_metric(const std::function<void(const char *, const char *, const char *, double)> & add) {
    std::lock_guard<std::mutex> lock(taken.mutex);
    if (!taken.is_on) {
        return;
    }
    const auto & stats = taken.stats;
    add("counter", "kv_compressions_total", "Elastic KV cache: prompts compressed", (double) stats.n_compressions);
    add("counter", "kv_evictions_total", "Elastic KV cache: cells evicted while generating", (double) stats.n_evictions);
    add("counter", "kv_released_bytes_total", "Elastic KV cache: bytes of K and V given back to the operating system",
        (double) stats.n_bytes_released);
    add("gauge", "kv_tokens", "Elastic KV cache: tokens seen by the sequences of the slots", (double) taken.n_tokens);
    add("gauge", "kv_cells", "Elastic KV cache: cells that these take", (double) taken.n_cells);
    add("gauge", "kv_checkpoint_bytes", "Elastic KV cache: bytes of checkpoints", (double) stats.n_bytes_checkpoints);
}
