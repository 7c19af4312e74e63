#include "core/select.h"

#include <algorithm>
#include <cmath>
#include <numeric>

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
    int64_t n_held       = 0;  // of the image, in all layers
    for (int32_t i = 0; i < c.size(); ++i) {
        n_cells[c.is_image(i)]++;
        n_tokens[c.is_image(i)] += c.n_tokens(i);
        n_tokens_old += c.is_old(i) ? c.n_tokens(i) : 0;
        n_new += !c.is_image(i) && !c.is_old(i);
    }
    const int64_t n_all   = n_tokens[0] + n_tokens[1];
    const int32_t n_layer = c.absent.empty() ? 1 : (int32_t) (c.absent.size() / c.kind.size());
    for (int32_t il = 0; il < n_layer; ++il) {
        for (int32_t i = 0; i < c.size(); ++i) {
            n_held += c.is_image(i) && !c.is_absent(il, i);
        }
    }
    const int32_t n_old   = (int32_t) (n_keep * n_tokens_old / n_all);
    const int32_t n_least = (int32_t) (n_keep * n_tokens[1] / (2 * n_all));

    split res;
    res.n_image = std::min({ n_keep - n_new - n_old, (int32_t) ((n_held + n_layer - 1) / n_layer), n_cells[1] });
    res.n_image = std::max(res.n_image, std::max(std::min(n_least, n_cells[1]), n_keep - n_cells[0]));
    res.n_text  = n_keep - res.n_image;
    return res;
}

int32_t recent_cells(select_rule rule, const plan_params & params) {
    switch (rule) {
        case select_rule::heavy_recent:
            return std::max(1, params.n_keep / 2);
        case select_rule::window_top:
            return std::max(1, std::min(window_size, params.n_keep / 2));
        default:
            return 1;
    }
}

int32_t sink_cells(select_rule rule, const plan_params & params) {
    return std::min(params.n_sink, params.n_keep - recent_cells(rule, params));
}

bool cells::has_past() const {
    const bool any_old   = std::find(old.begin(), old.end(), 1) != old.end();
    const bool any_image = std::find(kind.begin(), kind.end(), cell_kind::image) != kind.end();
    return any_old && any_image;
}

std::vector<uint8_t> cells_apart(const plan_params & params, const cells & c) {
    const int32_t n      = c.size();
    const int32_t n_most = params.n_keep / 4;

    std::vector<uint8_t> res(n, 0);
    int32_t              place   = 0;  // in its image
    int32_t              n_start = 0;
    for (int32_t i = 0; i < n; ++i) {
        if (!c.is_image(i)) {
            place  = 0;
            res[i] = n - i <= std::min(text_recent, n_most);
        } else if (place++ < image_start && n_start < n_most) {
            res[i] = 1;
            n_start++;
        }
    }
    if (c.has_past()) {  // the present question, half of all cells at most
        int32_t n_left = params.n_keep / 2;
        for (int32_t i = n - 1; i >= 0 && n_left > 0; --i) {
            if (!c.is_image(i) && !c.is_old(i)) {
                res[i] = 1;
                n_left--;
            }
        }
    }
    return res;
}

std::vector<uint8_t> protected_cells(select_rule rule, const plan_params & params, const cells & c) {
    const int32_t        n = c.size();
    std::vector<uint8_t> res(n, 0);
    std::fill(res.begin(), res.begin() + std::min(n, sink_cells(rule, params)), 1);
    std::fill(res.end() - std::min(n, recent_cells(rule, params)), res.end(), 1);
    for (int32_t i = 0; i < n; ++i) {
        res[i] |= c.pinned[i] != 0;
    }
    if (rule != select_rule::cover) {
        return res;
    }
    const auto apart  = cells_apart(params, c);
    int32_t    n_free = params.n_keep - (int32_t) std::count(res.begin(), res.end(), 1);
    for (int32_t i = n - 1; i >= 0 && n_free > 0; --i) {
        if (apart[i] && !res[i]) {
            res[i] = 1;
            n_free--;
        }
    }
    return res;
}

static bool by_kind(select_rule rule) {
    return rule == select_rule::image_first || rule == select_rule::cover;
}

namespace {

std::vector<segment> make_segments(bool split_kinds, const cells & c, const std::vector<uint8_t> & protect) {
    std::vector<segment> res;
    for (int32_t i = 0; i < c.size(); ++i) {
        if (i == 0 || (split_kinds && c.is_image(i) != c.is_image(i - 1))) {
            res.emplace_back();
            res.back().image = c.is_image(i);
        }
        auto & s = res.back();
        s.cells.push_back(i);
        s.protect.push_back(protect[i]);
        s.n_protect += protect[i];
        s.n_tokens += protect[i] ? 0 : c.n_tokens(i);
    }
    return res;
}

// shares n_keep between segments: each its protected cells, then in proportion to the tokens that the rest stands for,
// rounded down, what is left over going to the earlier ones
void share(std::vector<segment *> & segments, int32_t n_keep) {
    int32_t                n_left = n_keep;
    std::vector<segment *> open;
    for (auto * s : segments) {
        s->n_keep = s->n_protect;
        n_left -= s->n_protect;
        open.push_back(s);
    }
    const auto room = [](const segment * s) {
        return (int32_t) s->cells.size() - s->n_protect;
    };
    const auto part = [&](const segment * s) {
        int64_t n_tokens = 0;
        for (const auto * other : open) {
            n_tokens += other->n_tokens;
        }
        return n_tokens > 0 ? (int32_t) (n_left * s->n_tokens / n_tokens) : 0;
    };
    // those that have fewer cells than their part keep all of them
    for (auto it = open.begin(); it != open.end();) {
        segment * s = *it;
        if (room(s) > 0 && part(s) < room(s)) {
            ++it;
            continue;
        }
        s->n_keep += room(s);
        n_left -= room(s);
        open.erase(it);
        it = open.begin();
    }
    std::vector<int32_t> parts;
    for (const auto * s : open) {
        parts.push_back(part(s));
    }
    for (size_t i = 0; i < open.size(); ++i) {
        open[i]->n_keep += parts[i];
        n_left -= parts[i];
    }
    for (auto * s : segments) {
        if (n_left > 0 && s->n_keep < (int32_t) s->cells.size()) {
            s->n_keep++;
            n_left--;
        }
    }
}

// the split by kind, corrected so that the protected cells of either kind fit
void share_by_kind(std::vector<segment> & segments, const cells & c, int32_t n_keep) {
    std::vector<segment *> of[2];  // text, image
    int32_t                n[2]         = { 0, 0 };
    int32_t                n_protect[2] = { 0, 0 };
    for (auto & s : segments) {
        of[s.image].push_back(&s);
        n[s.image] += (int32_t) s.cells.size();
        n_protect[s.image] += s.n_protect;
    }
    const split   part   = c.has_past() ? split_with_past(n_keep, c) : split_budget(n_keep, n[0], n[1]);
    const int32_t n_text = std::min(std::max(part.n_text, n_protect[0]), n_keep - n_protect[1]);
    share(of[0], n_text);
    share(of[1], n_keep - n_text);
}

// the kept cells of a run for one layer and head, in rank order; returns where they end
int32_t * select_head(const segment & s, bool ranked, const float * score, std::vector<int32_t> & scratch, int32_t * kept) {
    scratch.clear();
    for (size_t k = 0; k < s.cells.size(); ++k) {
        if (!s.protect[k]) {
            scratch.push_back(s.cells[k]);
        }
    }
    const auto higher = [&](int32_t a, int32_t b) {
        return score[a] != score[b] ? score[a] > score[b] : a < b;
    };
    const int32_t n = s.n_keep - s.n_protect;
    if (n < (int32_t) scratch.size()) {
        std::nth_element(scratch.begin(), scratch.begin() + n, scratch.end(), higher);
        scratch.resize(n);
    }

    int32_t * first = kept;
    size_t    k     = 0;
    for (; k < s.cells.size() && s.protect[k]; ++k) {
        *kept++ = s.cells[k];
    }
    if (ranked) {
        std::sort(scratch.begin(), scratch.end(), higher);
    }
    kept = std::copy(scratch.begin(), scratch.end(), kept);
    for (; k < s.cells.size(); ++k) {
        if (s.protect[k]) {
            *kept++ = s.cells[k];
        }
    }
    if (!ranked) {
        std::sort(first, kept);
    }
    return kept;
}

}  // namespace

std::vector<segment> shared_segments(select_rule rule, const cells & c, const std::vector<uint8_t> & protect, int32_t n_keep) {
    std::vector<segment> res = make_segments(by_kind(rule), c, protect);
    if (by_kind(rule)) {
        share_by_kind(res, c, n_keep);
    } else {
        res[0].n_keep = n_keep;
    }
    return res;
}

void select_cells(select_rule rule, bool ranked, const plan_params & params, const cells & c, const head_map & score, plan & p) {
    p.kept.resize((size_t) p.n_layer * p.n_head_kv * p.n_keep);

    const auto    protect   = protected_cells(rule, params, c);
    const int32_t n_protect = std::accumulate(protect.begin(), protect.end(), 0);
    if (n_protect > p.n_keep) {
        throw error("[select] " + std::to_string(n_protect) + " cells must stay, got n_keep = " + std::to_string(p.n_keep));
    }

    const auto segments = shared_segments(rule, c, protect, p.n_keep);

    std::vector<int32_t> scratch;
    int32_t *            kept = p.kept.data();
    for (int32_t il = 0; il < p.n_layer; ++il) {
        for (int32_t ih = 0; ih < p.n_head_kv; ++ih) {
            for (const auto & s : segments) {
                kept = select_head(s, ranked, score.row(il, ih), scratch, kept);
            }
        }
    }
}

void sum_rank_scores(select_rule rule, const plan_params & params, const cells & c, const head_map & score, plan & p) {
    const auto protect  = protected_cells(rule, params, c);
    const auto segments = shared_segments(rule, c, protect, params.n_keep);

    p.rank_score.assign(p.n_keep, 0.0f);

    std::vector<uint8_t> whole(c.size(), 0);
    for (const auto & s : segments) {
        if (!s.image && s.n_keep == (int32_t) s.cells.size()) {
            for (const int32_t i : s.cells) {
                whole[i] = 1;
            }
        }
    }
    for (int32_t il = 0; il < p.n_layer; ++il) {
        for (int32_t ih = 0; ih < p.n_head_kv; ++ih) {
            const int32_t * kept = p.kept_row(il, ih);
            const float *   src  = score.row(il, ih);
            for (int32_t j = 0; j < p.n_keep; ++j) {
                const int32_t i = kept[j];
                if (i < 0) {
                    continue;
                }
                p.rank_score[j] = protect[i] || whole[i] ? HUGE_VALF : p.rank_score[j] + src[i];
            }
        }
    }
}

}  // namespace elastic
