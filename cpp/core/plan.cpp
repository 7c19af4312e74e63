#include "core/plan.h"

#include <algorithm>
#include <iterator>

namespace elastic {

[[noreturn]] static void broken(const std::string & what, int32_t il, int32_t ih) {
    throw error("[plan] layer " + std::to_string(il) + ", KV head " + std::to_string(ih) + ": " + what);
}

static void validate_head(const plan & p, const cells & c, int32_t n_sink, int32_t il, int32_t ih) {
    const int32_t * kept   = p.kept_row(il, ih);
    const int32_t * bucket = p.bucket_row(il, ih);

    std::vector<uint8_t> seen(p.n_cells, 0);
    for (int32_t j = 0; j < p.n_keep; ++j) {
        if ((kept[j] < 0) == p.holds(il, j)) {
            broken("rank " + std::to_string(j) + " is held by some heads only", il, ih);
        }
        if (kept[j] == -1) {
            continue;
        }
        if (kept[j] < 0 || kept[j] >= p.n_cells) {
            broken("kept cell " + std::to_string(kept[j]) + " is out of range", il, ih);
        }
        if (seen[kept[j]]++) {
            broken("cell " + std::to_string(kept[j]) + " is kept twice", il, ih);
        }
        if (bucket[kept[j]] != j) {
            broken("kept cell " + std::to_string(kept[j]) + " is not in its own bucket", il, ih);
        }
    }
    if (kept[p.n_keep - 1] != p.n_cells - 1) {
        broken("the last cell is not kept", il, ih);
    }
    for (int32_t i = 0; i < n_sink; ++i) {
        if (kept[i] != i) {
            broken("sink " + std::to_string(i) + " is not kept", il, ih);
        }
    }
    for (int32_t i = 0; i < p.n_cells; ++i) {
        if (bucket[i] < -1 || bucket[i] >= p.n_keep) {
            broken("cell " + std::to_string(i) + " is in bucket " + std::to_string(bucket[i]), il, ih);
        }
        const bool is_kept = bucket[i] >= 0 && kept[bucket[i]] == i;
        if (c.pinned[i] && !is_kept) {
            broken("pinned cell " + std::to_string(i) + " is not kept", il, ih);
        }
        if (!is_kept && bucket[i] >= 0 && c.pinned[kept[bucket[i]]]) {
            broken("cell " + std::to_string(i) + " joins a pinned cell", il, ih);
        }
    }
}

void validate(const plan & p, const cells & c, int32_t n_sink) {
    const size_t n_heads = (size_t) p.n_layer * p.n_head_kv;
    if (p.n_layer < 1 || p.n_head_kv < 1 || p.n_keep < 1 || p.n_keep > p.n_cells || p.n_cells != c.size() ||
        c.pinned.size() != c.kind.size() || p.kept.size() != n_heads * p.n_keep || p.bucket.size() != n_heads * p.n_cells) {
        throw error("[plan] sizes do not agree with " + std::to_string(c.size()) + " cells");
    }
    for (int32_t il = 0; il < p.n_layer; ++il) {
        for (int32_t ih = 0; ih < p.n_head_kv; ++ih) {
            validate_head(p, c, n_sink, il, ih);
        }
    }
}

std::vector<int32_t> rank_positions(const plan & p) {
    std::vector<int32_t> res(p.n_keep, 0);
    std::vector<int32_t> sorted;
    for (int32_t il = 0; il < p.n_layer; ++il) {
        for (int32_t ih = 0; ih < p.n_head_kv; ++ih) {
            sorted.clear();
            std::copy_if(p.kept_row(il, ih), p.kept_row(il, ih) + p.n_keep, std::back_inserter(sorted), [](int32_t i) { return i >= 0; });
            std::sort(sorted.begin(), sorted.end());
            auto next = sorted.begin();
            for (int32_t j = 0; j < p.n_keep; ++j) {
                if (p.holds(il, j)) {
                    res[j] = std::max(res[j], *next++);
                }
            }
        }
    }
    // a layer with few cells has late ones at early ranks
    for (int32_t j = p.n_keep - 2; j >= 0; --j) {
        res[j] = std::min(res[j], res[j + 1] - 1);
    }
    return res;
}

}  // namespace elastic
