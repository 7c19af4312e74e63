#pragma once

#include "core/selector.h"

namespace elastic {

// Text stays while it can, image cells share what is left (kind_split.h). The number of a kind is shared between its runs in
// proportion to the tokens of their unprotected cells. In a run the cells of highest score stay.
class image_first_selector : public selector {
  public:
    const char *     name() const override { return "image_first"; }
    std::vector<run> runs(const protection & p, const cells & c, int32_t n_keep) const override;
    choice           choose(const run & r, const float * score, head_rows & rows) const override;
};

}  // namespace elastic
