#pragma once

#include "core/scorer.h"

namespace elastic {

// A cell's share of all attention, and its share of the recent attention:
//   for text half of it comes from the cells before, text_carry per cell (an answer that quotes a word goes on to the next),
//   for image cells the latter counts asked_ahead times if the cells end with an image, for a question that is still to come will look
//   where the words around the image do, not where patches do.
// No share is averaged over neighbours.
class expected_attention_scorer : public scorer {
  public:
    explicit expected_attention_scorer(float image_power = 1.0f) : image_power(image_power) {}

    const char * name() const override { return image_power == 1.0f ? "expected_attention" : "expected_attention_damped"; }
    statistics   needs() const override { return { true, 0, decay, false }; }
    bool         is_attention() const override { return true; }
    head_map     score(const score_view & v) const override;

    // How much the weight of a query of text shrinks with every later one. Chosen on the dev texts with the embedded model.
    float decay       = 0.9f;
    // How much of what a cell of text was looked at goes on to the next. Chosen on the dev texts with the embedded model.
    float text_carry  = 0.94f;
    // What the recent score counts for image cells while the question is still to come. Chosen on the dev scenes with the embedded model.
    float asked_ahead = 3.0f;

    // The power to which the score of an image cell is raised. Below 1 a cell that this question does not look at is worth more: what the
    // image is asked later is not known.
    float image_power;

  private:
    void score_head(const cells & c, const float * recent, float * score) const;
};

}  // namespace elastic
