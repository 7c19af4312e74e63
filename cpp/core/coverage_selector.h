#pragma once

#include "core/image_first_selector.h"

namespace elastic {

// Selects cells of a run by coverage: those left out have a kept one near (weighted farthest-first).
//
// A dropped cell is merged into the nearest kept one, so dropping it costs its score times what is
// lost by taking that one for it. Cells are therefore kept one after another, always the one of greatest
//     score * distance^1.5 to the nearest kept cell that may be an anchor
// (the first is that of the highest score; ties to the earlier cell). The distance is the squared one between keys plus that
// between values, each divided by its variance over the run: attention does not change when all keys move by the
// same vector, so cosines would measure what does not matter.
class coverage_selector : public image_first_selector {
  public:
    const char *         name() const override { return "coverage"; }
    statistics           needs() const override { return { false, 0, 0.0f, true }; }
    bool                 weighs_scores() const override { return true; }
    bool                 finds_neighbours() const override { return true; }
    bool                 can_rank() const override { return false; }
    // the newest text, the first cells of every image, and in a later turn about an image the present question
    std::vector<uint8_t> verbatim(int32_t n_keep, const cells & c) const override;
    choice               choose(const run & r, const float * score, head_rows & rows) const override;

    // The newest text, a quarter of all cells at most. Chosen on the dev scenes and texts with the embedded model.
    int32_t text_recent = elastic::text_recent;
    // The first cells of every image, a quarter of all cells at most. Chosen on the dev scenes with the embedded model.
    int32_t image_start = 3;
};

}  // namespace elastic
