#include "runtime/cache_parts.h"

#include "runtime/kv_layers.h"

#include <algorithm>
#include <numeric>

namespace elastic {

static importance_needs needs_of(const config & cfg) {
    return { cfg.has_sum(), cfg.decay() };
}

// On a device a compression waits for transfers of K and V and gives no memory back, and a scored token has a graph of its own, which
// costs as much as three or four tokens (CUDA). So answers are compressed later and scored less often there, if nothing was chosen.
static bool has_device_rules(const config & cfg, bool on_device) {
    return on_device && cfg.pol.recompresses() && cfg.overdraft < 0 && cfg.max_cells == 0;
}

static int32_t interval_of(const config & cfg, bool on_device) {
    const int32_t n = cfg.pol.scores_generation() ? cfg.pol.generation_interval() : 0;
    return has_device_rules(cfg, on_device) ? 4 * n : n;
}

cache_parts::cache_parts(llama_context & ctx, const config & cfg, int32_t n_threads, int32_t n_ubatch)
    : cfg(cfg), active(cfg.record || !cfg.keeps_all()), n_threads(cfg.n_threads > 0 ? cfg.n_threads : n_threads), n_ubatch(n_ubatch),
      kv(ctx), on_device(!on_host(kv)), seqs(interval_of(cfg, on_device)),
      scores(kv.shape.n_layer, kv.shape.n_head_kv, kv.shape.kv_size, kv.shape.n_stream, needs_of(cfg)),
      windows(kv.shape.n_layer, kv.shape.n_head_kv, kv.shape.kv_size, cfg.n_window()), bias(kv, cfg.pol.needs_bias()),
      table(kv.shape.n_layer, kv.shape.n_head_kv, kv.shape.kv_size, kv.shape.n_stream, cfg.pol.needs_counts()),
      memory(kv, bias, cfg.release_memory && active) {}

void cache_parts::check_seq_id(llama_seq_id seq_id) const {
    const int32_t n = kv.n_seq_max();
    if (seq_id < 0 || seq_id >= n) {
        throw error("[elastic] seq_id: got " + std::to_string(seq_id) + ", expected 0 <= seq_id < " + std::to_string(n));
    }
}

int32_t cache_parts::target_cells(int64_t n_tokens) const {
    const int32_t n = std::max(cfg.min_cells, cfg.keep.cells_for(n_tokens));
    return cfg.max_cells > 0 ? std::min(n, cfg.max_cells) : n;
}

// as many cells stay free for other sequences
int32_t cache_parts::overdraft(llama_seq_id seq_id, int32_t allowed) const {
    const int32_t n = cfg.n_overdraft();
    return has_device_rules(cfg, on_device) ? std::max(n, std::min(allowed, kv.n_free(seq_id))) : n;
}

int32_t average(const std::vector<int32_t> & of_layers) {
    const int64_t total = std::accumulate(of_layers.begin(), of_layers.end(), (int64_t) 0);
    return (int32_t) ((total + (int64_t) of_layers.size() - 1) / (int64_t) of_layers.size());
}

std::vector<int32_t> cache_parts::cells_per_layer(llama_seq_id seq_id) const {
    return bias.any_masked() ? bias.cells_per_layer(kv.stream(seq_id), kv.rows(seq_id))
                             : std::vector<int32_t>(kv.shape.n_layer, kv.n_cells(seq_id));
}

int32_t cache_parts::n_per_layer(llama_seq_id seq_id) const {
    return average(cells_per_layer(seq_id));
}

int64_t cache_parts::kv_bytes(llama_seq_id seq_id) const {
    int64_t n_total = (int64_t) kv.n_cells(seq_id) * kv.shape.n_layer;
    if (memory.frees_layers()) {
        const auto held = cells_per_layer(seq_id);
        n_total         = std::accumulate(held.begin(), held.end(), (int64_t) 0);
    }
    return n_total * kv.shape.cell_bytes / kv.shape.n_layer + kv.n_cells(seq_id) * bias.bytes_per_cell();
}

int32_t cache_parts::n_generated(llama_seq_id seq_id) const {
    return kv.n_cells(seq_id, seqs.get(seq_id).pos_prompt + 1, INT32_MAX);
}

void cache_parts::end_prompt(llama_seq_id seq_id) {
    seqs.at(seq_id).pending = false;
    windows.forget(seq_id);
}

void cache_parts::reset_cell(uint32_t strm, int32_t row, cell_kind kind) {
    scores.reset_cell(strm, row);
    bias.reset_cell(strm, row);
    table.reset_cell(strm, row, kind);
}

void cache_parts::move_head(uint32_t strm, int32_t src, int32_t dst, int32_t il, int32_t ih) {
    scores.move_head(strm, src, dst, il, ih);
    bias.move_head(strm, src, dst, il, ih);
    table.move_head(strm, src, dst, il, ih);
}

void cache_parts::mask(uint32_t strm, int32_t row, int32_t il) {
    scores.reset_cell(strm, row, il);
    table.reset_counts(strm, row, il);
    bias.mask(strm, row, il);
}

}  // namespace elastic
