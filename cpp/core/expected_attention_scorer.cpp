#include "core/expected_attention_scorer.h"

#include "core/pooling.h"

#include <cmath>

namespace elastic {

// What is looked at moves on through a text, so each cell gets what it and those before it got, less and less with the distance.
// Without the first cell: it is a sink, looked at whatever comes.
static std::vector<float> carried(const float * x, int32_t n, float text_carry) {
    std::vector<float> res(n);
    double             sum = 0.0;
    for (int32_t i = 1; i < n; ++i) {
        sum    = sum * text_carry + x[i];
        res[i] = (float) sum;
    }
    return res;
}

void expected_attention_scorer::score_head(const cells & c, const float * recent, float * score) const {
    const int32_t n        = c.size();
    const auto    next     = carried(recent, n, text_carry);
    const double  n_sum    = total_of(score, n);
    const double  n_recent = total_of(recent, n);
    const double  n_image  = n_recent / (c.ends_with_image() ? asked_ahead : 1.0);
    const double  n_text   = 2.0 * n_recent;
    const double  n_next   = 2.0 * total_of(next.data(), n);

    const auto share = [](double x, double all) {
        return all > 0.0 ? x / all : 0.0;
    };
    for (int32_t i = 0; i < n; ++i) {
        const double asked = c.is_image(i) ? share(recent[i], n_image) : share(recent[i], n_text) + share(next[i], n_next);
        score[i]           = (float) (share(score[i], n_sum) + asked);
        if (c.is_image(i) && image_power != 1.0f) {
            score[i] = std::pow(score[i], image_power);
        }
    }
}

head_map expected_attention_scorer::score(const score_view & v) const {
    head_map res = v.importance.sum;
    for (int32_t il = 0; il < v.n_layer(); ++il) {
        for (int32_t ih = 0; ih < v.n_head_kv(); ++ih) {
            score_head(v.c, v.importance.recent.row(il, ih), res.row(il, ih));
        }
    }
    return res;
}

}  // namespace elastic
