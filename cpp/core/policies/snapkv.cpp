// SnapKV (Li et al. 2024, arXiv:2404.14469): attention of the last queries, pooled, per KV head.

#include "core/evict_cell.h"
#include "core/policy.h"
#include "core/top_selector.h"
#include "core/window_scorer.h"

namespace elastic {

policy make_snapkv() {
    return compose("snapkv", "attention of the last queries, pooled, per KV head (SnapKV)", make_part<window_scorer>(),
                   make_part<uniform_layers>(), make_part<top_selector>("window_top", window_size), make_part<evict_combiner>(),
                   make_part<lowest_evictor>());
}

}  // namespace elastic
