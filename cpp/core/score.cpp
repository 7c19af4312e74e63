#include "core/score.h"

#include <algorithm>
#include <numeric>

namespace elastic {

// every row of the group [first, first + n) becomes the group's mean
static void average_rows(head_map & m, int32_t first, int32_t n) {
    float * rows = m.data.data() + (size_t) first * m.n_cells;
    for (int32_t i = 0; i < m.n_cells; ++i) {
        double sum = 0.0;
        for (int32_t r = 0; r < n; ++r) {
            sum += rows[(size_t) r * m.n_cells + i];
        }
        rows[i] = (float) (sum / n);
    }
    for (int32_t r = 1; r < n; ++r) {
        std::copy(rows, rows + m.n_cells, rows + (size_t) r * m.n_cells);
    }
}

// mean over the n_near cells around each, fewer at the ends
static std::vector<float> pooled(const float * x, int32_t n, int32_t n_near) {
    const int32_t      half = n_near / 2;
    std::vector<float> res(n);
    for (int32_t i = 0; i < n; ++i) {
        const int32_t lo  = std::max(0, i - half);
        const int32_t hi  = std::min(n, i + half + 1);
        double        sum = 0.0;
        for (int32_t j = lo; j < hi; ++j) {
            sum += x[j];
        }
        res[i] = (float) (sum / (hi - lo));
    }
    return res;
}

// What is looked at moves on through a text, so each cell gets what it and those before it got, less and less with the distance.
// Without the first cell: it is a sink, looked at whatever comes.
static std::vector<float> followed(const float * x, int32_t n) {
    std::vector<float> res(n);
    double             sum = 0.0;
    for (int32_t i = 1; i < n; ++i) {
        sum    = sum * text_follow + x[i];
        res[i] = (float) sum;
    }
    return res;
}

static double total(const float * x, int32_t n) {
    return std::accumulate(x, x + n, 0.0);
}

// in place
static void score_by_kind(const cells & c, const float * recent, float * score) {
    const int32_t      n = c.size();
    // the first words and the question draw far more than patches do, which must not spill over to the patches beside them
    std::vector<float> image_only(n);
    for (int32_t i = 0; i < n; ++i) {
        image_only[i] = c.is_image(i) ? recent[i] : 0.0f;
    }
    const auto   of_image = pooled(image_only.data(), n, kind_pool_size);
    const auto   of_text  = pooled(recent, n, kind_pool_size);
    const auto   next     = followed(recent, n);
    const double n_sum    = total(score, n);
    const double n_image  = total(recent, n) / (c.ends_with_image() ? asked_ahead : 1.0);
    const double n_text   = 2.0 * total(of_text.data(), n);
    const double n_next   = 2.0 * total(next.data(), n);

    const auto share = [](double x, double all) {
        return all > 0.0 ? x / all : 0.0;
    };
    for (int32_t i = 0; i < n; ++i) {
        const double asked = c.is_image(i) ? share(of_image[i], n_image) : share(of_text[i], n_text) + share(next[i], n_next);
        score[i]           = (float) (share(score[i], n_sum) + asked);
    }
}

// a hash, so that the draw depends on nothing but its place (splitmix64)
static float uniform(uint64_t x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return (float) ((x ^ (x >> 31)) >> 40) / (float) (1 << 24);
}

template <typename F> static void for_each_row(head_map & m, F fn) {
    for (int32_t il = 0; il < m.n_layer; ++il) {
        for (int32_t ih = 0; ih < m.n_head_kv; ++ih) {
            fn(il, ih, m.row(il, ih));
        }
    }
}

void add_share(float * dst, const float * src, const float * used, int32_t n, int32_t n_parts) {
    for (int32_t i = 0; i < n; ++i) {
        dst[i] += used[i] != 0.0f ? src[i] / (float) n_parts : 0.0f;
    }
}

head_map score_cells(score_rule rule, const cells & c, const importance_map & importance) {
    head_map res = importance.sum;
    switch (rule) {
        case score_rule::none:
        case score_rule::frequency:
            break;
        case score_rule::frequency_layer:
            for (int32_t il = 0; il < res.n_layer; ++il) {
                average_rows(res, il * res.n_head_kv, res.n_head_kv);
            }
            break;
        case score_rule::frequency_model:
            average_rows(res, 0, res.n_layer * res.n_head_kv);
            break;
        case score_rule::recency:
            for_each_row(res, [&](int32_t, int32_t, float * row) { std::iota(row, row + res.n_cells, 0.0f); });
            break;
        case score_rule::random:
            for_each_row(res, [&](int32_t il, int32_t ih, float * row) {
                for (int32_t i = 0; i < res.n_cells; ++i) {
                    row[i] = uniform(((uint64_t) il << 48) ^ ((uint64_t) ih << 32) ^ (uint64_t) i);
                }
            });
            break;
        case score_rule::window:
            for_each_row(res, [&](int32_t il, int32_t ih, float * row) {
                const auto pool = pooled(importance.recent.row(il, ih), res.n_cells, pool_size);
                std::copy(pool.begin(), pool.end(), row);
            });
            break;
        case score_rule::by_kind:
            for_each_row(res, [&](int32_t il, int32_t ih, float * row) { score_by_kind(c, importance.recent.row(il, ih), row); });
            break;
    }
    return res;
}

}  // namespace elastic
