// The floor: what any other policy should be better than.

#include "core/evict_cell.h"
#include "core/policy.h"
#include "core/top_selector.h"

namespace elastic {

namespace {

// a hash, so that the draw depends on nothing but its place (splitmix64)
float uniform(uint64_t x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return (float) ((x ^ (x >> 31)) >> 40) / (float) (1 << 24);
}

// a fixed shuffle per layer and KV head
class random_scorer : public scorer {
  public:
    const char * name() const override { return "random"; }
    head_map     score(const score_view & v) const override {
        head_map res = v.zeros();
        for (int32_t il = 0; il < v.n_layer(); ++il) {
            for (int32_t ih = 0; ih < v.n_head_kv(); ++ih) {
                for (int32_t i = 0; i < v.n_cells(); ++i) {
                    res.row(il, ih)[i] = uniform(((uint64_t) il << 48) ^ ((uint64_t) ih << 32) ^ (uint64_t) i);
                }
            }
        }
        return res;
    }
};

}  // namespace

policy make_random() {
    return compose("random", "cells drawn at random per KV head (the floor)", make_part<random_scorer>(), make_part<uniform_layers>(),
                   make_part<top_selector>(), make_part<evict_combiner>(), make_part<lowest_evictor>());
}

}  // namespace elastic
