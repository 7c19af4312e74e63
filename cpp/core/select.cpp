#include "core/select.h"

#include <algorithm>
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

namespace {

// a run of cells that share one number of kept cells, the same in all layers and heads: so rank j is of one kind everywhere
struct segment {
    std::vector<int32_t> cells;    // logical indices, ascending
    std::vector<uint8_t> protect;  // [cells]
    bool                 image     = false;
    int32_t              n_protect = 0;
    int32_t              n_keep    = 0;
};

bool is_image(const cells & c, int32_t i) {
    return c.kind[i] == cell_kind::image;
}

// protected: sinks, the last cell, pinned cells
std::vector<uint8_t> protected_cells(const plan_params & params, const cells & c) {
    const int32_t        n = c.size();
    std::vector<uint8_t> res(n, 0);
    res[n - 1] = 1;
    for (int32_t i = 0; i < std::min(params.n_sink, params.n_keep - 1); ++i) {
        res[i] = 1;
    }
    for (int32_t i = 0; i < n; ++i) {
        res[i] |= c.pinned[i] != 0;
    }
    return res;
}

std::vector<segment> make_segments(bool by_kind, const cells & c, const std::vector<uint8_t> & protect) {
    std::vector<segment> res;
    for (int32_t i = 0; i < c.size(); ++i) {
        if (i == 0 || (by_kind && is_image(c, i) != is_image(c, i - 1))) {
            res.emplace_back();
            res.back().image = is_image(c, i);
        }
        auto & s = res.back();
        s.cells.push_back(i);
        s.protect.push_back(protect[i]);
        s.n_protect += protect[i];
    }
    return res;
}

// shares n_keep between segments: each its protected cells, then in proportion to the rest of their sizes,
// rounded down, what is left over going to the earlier ones
void share(std::vector<segment *> & segments, int32_t n_keep) {
    int64_t n_free = 0;
    int32_t n_left = n_keep;
    for (auto * s : segments) {
        s->n_keep = s->n_protect;
        n_left -= s->n_protect;
        n_free += (int64_t) s->cells.size() - s->n_protect;
    }
    const int32_t n_shared = n_left;
    for (auto * s : segments) {
        const int64_t size = (int64_t) s->cells.size() - s->n_protect;
        const int32_t part = n_free > 0 ? (int32_t) (n_shared * size / n_free) : 0;
        s->n_keep += part;
        n_left -= part;
    }
    for (auto * s : segments) {
        if (n_left > 0 && s->n_keep < (int32_t) s->cells.size()) {
            s->n_keep++;
            n_left--;
        }
    }
}

// the split by kind, corrected so that the protected cells of either kind fit
void share_by_kind(std::vector<segment> & segments, int32_t n_keep) {
    std::vector<segment *> of[2];  // text, image
    int32_t                n[2]         = { 0, 0 };
    int32_t                n_protect[2] = { 0, 0 };
    for (auto & s : segments) {
        of[s.image].push_back(&s);
        n[s.image] += (int32_t) s.cells.size();
        n_protect[s.image] += s.n_protect;
    }
    const split   part   = split_budget(n_keep, n[0], n[1]);
    const int32_t n_text = std::min(std::max(part.n_text, n_protect[0]), n_keep - n_protect[1]);
    share(of[0], n_text);
    share(of[1], n_keep - n_text);
}

void select_head(const segment & s, const float * score, std::vector<uint8_t> & keep, std::vector<int32_t> & scratch) {
    scratch.clear();
    for (size_t k = 0; k < s.cells.size(); ++k) {
        if (s.protect[k]) {
            keep[s.cells[k]] = 1;
        } else {
            scratch.push_back(s.cells[k]);
        }
    }
    const int32_t n = s.n_keep - s.n_protect;
    if (n < (int32_t) scratch.size()) {
        std::nth_element(scratch.begin(), scratch.begin() + n, scratch.end(),
                         [&](int32_t a, int32_t b) { return score[a] != score[b] ? score[a] > score[b] : a < b; });
        scratch.resize(n);
    }
    for (const int32_t i : scratch) {
        keep[i] = 1;
    }
}

}  // namespace

void select_cells(select_rule rule, const plan_params & params, const cells & c, const head_map & score, plan & p) {
    p.kept.resize((size_t) p.n_layer * p.n_head_kv * p.n_keep);

    const auto    protect   = protected_cells(params, c);
    const int32_t n_protect = std::accumulate(protect.begin(), protect.end(), 0);
    if (n_protect > p.n_keep) {
        throw error("[select] " + std::to_string(n_protect) + " cells must stay, got n_keep = " + std::to_string(p.n_keep));
    }

    std::vector<segment> segments = make_segments(rule == select_rule::image_first, c, protect);
    if (rule == select_rule::image_first) {
        share_by_kind(segments, p.n_keep);
    } else {
        segments[0].n_keep = p.n_keep;
    }

    std::vector<uint8_t> keep(p.n_cells);
    std::vector<int32_t> scratch;
    int32_t *            kept = p.kept.data();
    for (int32_t il = 0; il < p.n_layer; ++il) {
        for (int32_t ih = 0; ih < p.n_head_kv; ++ih) {
            std::fill(keep.begin(), keep.end(), 0);
            for (const auto & s : segments) {
                select_head(s, score.row(il, ih), keep, scratch);
            }
            for (int32_t i = 0; i < p.n_cells; ++i) {
                if (keep[i]) {
                    *kept++ = i;
                }
            }
        }
    }
}

}  // namespace elastic
