#include "core/combine.h"

#include "core/parallel.h"
#include "core/similarity.h"

#include <algorithm>
#include <cmath>

namespace elastic {

// own ranks for kept cells, -1 for the others
static void keep_ranks(const plan & p, int32_t il, int32_t ih, int32_t * bucket) {
    std::fill(bucket, bucket + p.n_cells, -1);
    const int32_t * kept = p.kept_row(il, ih);
    for (int32_t j = 0; j < p.n_keep; ++j) {
        bucket[kept[j]] = j;
    }
}

static void assign_nearest(const cells & c, const int32_t * kept, int32_t n_keep, int32_t * bucket) {
    std::vector<int32_t> anchors;  // ranks
    for (int32_t j = 0; j < n_keep; ++j) {
        if (!c.pinned[kept[j]]) {
            anchors.push_back(j);
        }
    }
    if (anchors.empty()) {
        return;
    }
    size_t a = 0;
    for (int32_t i = 0; i < c.size(); ++i) {
        while (a + 1 < anchors.size() && std::abs(kept[anchors[a + 1]] - i) < std::abs(kept[anchors[a]] - i)) {
            ++a;
        }
        if (bucket[i] < 0) {
            bucket[i] = anchors[a];
        }
    }
}

static void assign_similar(const cells & c, const key_source & keys, int32_t il, int32_t ih, const int32_t * kept, int32_t n_keep,
                           int32_t * bucket) {
    std::vector<int32_t> anchors;  // ranks
    std::vector<int32_t> dropped;  // logical indices
    for (int32_t j = 0; j < n_keep; ++j) {
        if (c.kind[kept[j]] == cell_kind::image && !c.pinned[kept[j]]) {
            anchors.push_back(j);
        }
    }
    for (int32_t i = 0; i < c.size(); ++i) {
        if (bucket[i] < 0 && c.kind[i] == cell_kind::image) {
            dropped.push_back(i);
        }
    }
    if (anchors.empty() || dropped.empty()) {
        return;
    }

    const int32_t      d = keys.n_embd_head();
    std::vector<float> all((size_t) c.size() * d);
    keys.load(il, ih, all.data());

    std::vector<float> a(anchors.size() * d);
    for (size_t k = 0; k < anchors.size(); ++k) {
        const float * src  = all.data() + (size_t) kept[anchors[k]] * d;
        float         norm = 0.0f;
        for (int32_t e = 0; e < d; ++e) {
            norm += src[e] * src[e];
        }
        const float scale = norm > 0.0f ? 1.0f / std::sqrt(norm) : 0.0f;
        for (int32_t e = 0; e < d; ++e) {
            a[k * d + e] = src[e] * scale;
        }
    }
    std::vector<float> q(dropped.size() * d);
    for (size_t k = 0; k < dropped.size(); ++k) {
        std::copy_n(all.data() + (size_t) dropped[k] * d, d, q.data() + k * d);
    }

    std::vector<int32_t> best(dropped.size());
    most_similar(q.data(), (int32_t) dropped.size(), a.data(), (int32_t) anchors.size(), d, best.data());
    for (size_t k = 0; k < dropped.size(); ++k) {
        bucket[dropped[k]] = anchors[best[k]];
    }
}

void assign_buckets(combine_rule rule, const cells & c, const key_source * keys, plan & p, int32_t n_threads) {
    p.bucket.resize((size_t) p.n_layer * p.n_head_kv * p.n_cells);

    parallel_for(p.n_layer, n_threads, [&](int32_t il) {
        for (int32_t ih = 0; ih < p.n_head_kv; ++ih) {
            int32_t *       bucket = p.bucket.data() + ((size_t) il * p.n_head_kv + ih) * p.n_cells;
            const int32_t * kept   = p.kept_row(il, ih);

            keep_ranks(p, il, ih, bucket);
            switch (rule) {
                case combine_rule::evict:
                    break;
                case combine_rule::nearest_mean:
                    assign_nearest(c, kept, p.n_keep, bucket);
                    break;
                case combine_rule::mass:
                    assign_similar(c, *keys, il, ih, kept, p.n_keep, bucket);
                    break;
            }
        }
    });
}

}  // namespace elastic
