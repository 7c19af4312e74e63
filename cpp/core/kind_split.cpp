#include "core/kind_split.h"

#include <algorithm>

namespace elastic {

split split_budget(int32_t n_keep, int32_t n_text, int32_t n_image) {
    const int64_t n_cells = (int64_t) n_text + n_image;
    const int32_t share   = n_cells ? (int32_t) ((int64_t) n_keep * n_image / (2 * n_cells)) : 0;

    split res;
    res.n_image = std::min(n_image, std::max(n_keep - n_text, share));
    res.n_text  = std::min(n_text, n_keep - res.n_image);
    res.n_image = std::min(n_image, n_keep - res.n_text);
    return res;
}

split split_with_past(int32_t n_keep, const cells & c) {
    int32_t n_cells[2]   = { 0, 0 };  // text, image
    int64_t n_tokens[2]  = { 0, 0 };
    int64_t n_tokens_old = 0;
    int32_t n_new        = 0;
    int64_t n_rows       = 0;  // of the image, in all layers
    for (int32_t i = 0; i < c.size(); ++i) {
        n_cells[c.is_image(i)]++;
        n_tokens[c.is_image(i)] += c.n_tokens(i);
        n_tokens_old += c.is_old(i) ? c.n_tokens(i) : 0;
        n_new += !c.is_image(i) && !c.is_old(i);
    }
    const int64_t n_all   = n_tokens[0] + n_tokens[1];
    const int32_t n_layer = c.masked.empty() ? 1 : (int32_t) (c.masked.size() / c.kind.size());
    for (int32_t il = 0; il < n_layer; ++il) {
        for (int32_t i = 0; i < c.size(); ++i) {
            n_rows += c.is_image(i) && !c.is_masked(il, i);
        }
    }
    const int32_t n_old   = (int32_t) (n_keep * n_tokens_old / n_all);
    const int32_t n_least = (int32_t) (n_keep * n_tokens[1] / (2 * n_all));

    split res;
    res.n_image = std::min({ n_keep - n_new - n_old, (int32_t) ((n_rows + n_layer - 1) / n_layer), n_cells[1] });
    res.n_image = std::max(res.n_image, std::max(std::min(n_least, n_cells[1]), n_keep - n_cells[0]));
    res.n_text  = n_keep - res.n_image;
    return res;
}

bool cells::has_past() const {
    const bool any_old   = std::find(old.begin(), old.end(), 1) != old.end();
    const bool any_image = std::find(kind.begin(), kind.end(), cell_kind::image) != kind.end();
    return any_old && any_image;
}

void share_by_kind(std::vector<run> & runs, const cells & c, int32_t n_keep) {
    std::vector<run *> of[2];  // text, image
    int32_t            n[2]      = { 0, 0 };
    int32_t            n_stay[2] = { 0, 0 };
    for (auto & r : runs) {
        of[r.image].push_back(&r);
        n[r.image] += (int32_t) r.cells.size();
        n_stay[r.image] += r.n_stay;
    }
    const split   part   = c.has_past() ? split_with_past(n_keep, c) : split_budget(n_keep, n[0], n[1]);
    const int32_t n_text = std::min(std::max(part.n_text, n_stay[0]), n_keep - n_stay[1]);
    share_cells(of[0], n_text);
    share_cells(of[1], n_keep - n_text);
}

}  // namespace elastic
