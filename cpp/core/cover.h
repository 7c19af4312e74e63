#pragma once

#include "core/policy.h"

namespace elastic {

// Chooses the kept cells of a plan anew, as many in every run of cells of one kind (image, or not) as the plan keeps there: in each
// layer, or with layer_share on average over the layers; then n_keep becomes what the layers that keep most hold.
//
// A dropped cell is merged into the nearest kept one, so what it costs is its score times what is
// lost by taking that one for it. Places are therefore given one after another, each to the cell of greatest
//     score * distance^1.5 to the nearest cell that has a place
// (the first to the highest score; ties to the earlier cell). The distance is the squared one between keys plus that
// between values, each divided by its variance over the run: attention does not change when all keys move by the
// same vector, so cosines would measure what does not matter.
// Protected cells (select.h) have their places first; pinned ones and those that stay as they are count as kept but nothing joins them.
//
// Fills kept, and bucket for the dropped cells (-1 for all others, and where a run keeps no cell that may be joined: a few words between
// images, perhaps).
void cover_runs(const plan_params & params, const cells & c, const head_map & score, const row_source & rows, plan & p, int32_t n_threads);

}  // namespace elastic
