// Our scores and our split between text and images, without merging.

#include "core/evict_per_head.h"
#include "core/expected_attention_scorer.h"
#include "core/image_first_selector.h"
#include "core/policy.h"

namespace elastic {

policy make_elastic_evict() {
    return compose("elastic-evict", "text stays, image cells per KV head, the others are lost", make_part<expected_attention_scorer>(),
                   make_part<uniform_layers>(), make_part<image_first_selector>(), make_part<evict_combiner>(),
                   make_part<per_head_evictor>());
}

}  // namespace elastic
