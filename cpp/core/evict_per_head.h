#pragma once

// Evictors that take another cell from each head, by scores that are kept up while generating.

#include "core/evictor.h"

namespace elastic {

// In each head the lowest score of all but sinks, pinned cells and the newest; in a short answer also not the text whose
// total is infinite (it was kept whole, or newest of a text), unless nothing else is left. A short answer needs the whole
// question; a long one has taken from it what it needs, and the slots are worth more to the image.
class per_head_evictor : public evictor {
  public:
    const char *         name() const override { return "per_head"; }
    statistics           needs() const override { return { true, 0, 0.0f, false }; }
    bool                 per_head() const override { return true; }
    int32_t              interval() const override { return score_interval; }
    std::vector<int32_t> candidates(const cells & c, int32_t n_sink, const std::vector<float> & total) const override;

    // The newest tokens, which are never evicted. Chosen on the dev scenes and texts with the embedded model.
    int32_t n_recent       = per_head_recent;
    // The tokens up to which an answer counts as short. Chosen on the dev scenes with the embedded model.
    int32_t short_answer   = 4;
    // Adding the attention to the scores of all heads and cells costs time. Chosen on the dev scenes and texts with the embedded model.
    int32_t score_interval = 4;
};

// Nothing is evicted: the cache grows by an overdraft, and then is compressed as after a prompt. Where that cannot be, as per_head_evictor.
class recompress_evictor : public per_head_evictor {
  public:
    const char * name() const override { return "recompress"; }
    int32_t      overdraft() const override { return n_overdraft; }
    int32_t      reserve(const cells & c, int32_t n_keep) const override;

    // Chosen on the dev scenes and texts with the embedded model.
    int32_t n_overdraft = 32;
    // Cells that a compressed prompt leaves free for the answer, an eighth of all at most, none if it ends with an image; fewer then have
    // to be dropped while it is written. Chosen on the dev scenes with the embedded model.
    int32_t n_reserve   = 4;
};

// The cells in [max(n_sink, 0), n_cells - n_recent) that are not pinned.
std::vector<int32_t> evictable_cells(const cells & c, int32_t n_sink, int32_t n_recent);

}  // namespace elastic
