#include "core/policy.h"
#include "core/top_selector.h"

namespace elastic {

namespace {

class no_scorer : public scorer {
  public:
    const char * name() const override { return "none"; }
    head_map     score(const score_view & v) const override { return v.zeros(); }
};

}  // namespace

policy make_full() {
    return compose("full", "every cell stays", make_part<no_scorer>(), make_part<uniform_layers>(), make_part<all_selector>(),
                   make_part<evict_combiner>(), make_part<keep_evictor>());
}

}  // namespace elastic
