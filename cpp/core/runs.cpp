#include "core/runs.h"

#include <algorithm>

namespace elastic {

int32_t protection::n_stay() const {
    return (int32_t) std::count(stay.begin(), stay.end(), 1);
}

int32_t run::n_leading() const {
    return (int32_t) (std::find(stay.begin(), stay.end(), 0) - stay.begin());
}

std::vector<run> split_runs(bool split_kinds, const cells & c, const protection & p) {
    std::vector<run> res;
    for (int32_t i = 0; i < c.size(); ++i) {
        if (i == 0 || (split_kinds && c.is_image(i) != c.is_image(i - 1))) {
            res.emplace_back();
            res.back().image = c.is_image(i);
        }
        auto & r = res.back();
        r.cells.push_back(i);
        r.stay.push_back(p.stay[i]);
        r.verbatim.push_back(p.verbatim[i]);
        r.n_stay += p.stay[i];
        r.n_tokens += p.stay[i] ? 0 : c.n_tokens(i);
    }
    return res;
}

void share_cells(std::vector<run *> & runs, int32_t n_keep) {
    int32_t            n_left = n_keep;
    std::vector<run *> open;
    for (auto * r : runs) {
        r->n_keep = r->n_stay;
        n_left -= r->n_stay;
        open.push_back(r);
    }
    const auto room = [](const run * r) {
        return (int32_t) r->cells.size() - r->n_stay;
    };
    const auto part = [&](const run * r) {
        int64_t n_tokens = 0;
        for (const auto * other : open) {
            n_tokens += other->n_tokens;
        }
        return n_tokens > 0 ? (int32_t) (n_left * r->n_tokens / n_tokens) : 0;
    };
    // those that have fewer cells than their part keep all of them
    for (auto it = open.begin(); it != open.end();) {
        run * r = *it;
        if (room(r) > 0 && part(r) < room(r)) {
            ++it;
            continue;
        }
        r->n_keep += room(r);
        n_left -= room(r);
        open.erase(it);
        it = open.begin();
    }
    std::vector<int32_t> parts;
    for (const auto * r : open) {
        parts.push_back(part(r));
    }
    for (size_t i = 0; i < open.size(); ++i) {
        open[i]->n_keep += parts[i];
        n_left -= parts[i];
    }
    for (auto * r : runs) {
        if (n_left > 0 && !r->whole()) {
            r->n_keep++;
            n_left--;
        }
    }
}

}  // namespace elastic
