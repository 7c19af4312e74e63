#include "core/assign.h"

#include "kernels/parallel.h"

#include <cmath>

namespace elastic {

static void find_in_run(const run & r, const int32_t * bucket, head_rows & rows, int32_t * nearest) {
    std::vector<int32_t> anchors;
    for (int32_t i = 0; i < (int32_t) r.cells.size(); ++i) {
        if (bucket[r.cells[i]] >= 0 && !r.verbatim[i]) {
            anchors.push_back(i);
        }
    }
    if (r.whole() || anchors.empty()) {
        return;
    }
    rows.space.fill(r.cells, rows.k, rows.d_k, rows.v, rows.d_v);
    for (int32_t i = 0; i < (int32_t) r.cells.size(); ++i) {
        float least = HUGE_VALF;
        for (const int32_t j : anchors) {
            const float distance = bucket[r.cells[i]] < 0 ? rows.space.distance(i, j) : HUGE_VALF;
            if (distance < least) {
                least               = distance;
                nearest[r.cells[i]] = r.cells[j];
            }
        }
    }
}

static int32_t * bucket_of(plan & p, int32_t il, int32_t ih) {
    return p.bucket.data() + ((size_t) il * p.n_head_kv + ih) * p.n_cells;
}

neighbours find_neighbours(const layout & l, const plan & p, const row_source & rows, int32_t n_threads) {
    neighbours res((size_t) p.n_layer * p.n_head_kv * p.n_cells, -1);
    parallel_for(p.n_layer * p.n_head_kv, n_threads, [&](int32_t head) {
        const int32_t il = head / p.n_head_kv;
        const int32_t ih = head % p.n_head_kv;
        head_rows     own;
        own.load(rows, il, ih, p.n_cells);
        for (const auto & of_layers : l.of_layers) {
            find_in_run(of_layers[il], p.bucket_row(il, ih), own, res.data() + (size_t) head * p.n_cells);
        }
    });
    return res;
}

void assign_buckets(const combiner & m, const cells & c, const layout & l, neighbours nearest, const row_source * rows, plan & p,
                    int32_t n_threads) {
    p.bucket.assign((size_t) p.n_layer * p.n_head_kv * p.n_cells, -1);
    for (int32_t il = 0; il < p.n_layer; ++il) {
        for (int32_t ih = 0; ih < p.n_head_kv; ++ih) {
            for (int32_t j = 0; j < p.n_keep; ++j) {
                const int32_t cell = p.kept_row(il, ih)[j];
                if (cell >= 0) {
                    bucket_of(p, il, ih)[cell] = j;
                }
            }
        }
    }
    if (m.wants_neighbours() && nearest.empty()) {
        nearest = find_neighbours(l, p, *rows, n_threads);
    }
    for (int32_t il = 0; il < p.n_layer; ++il) {
        for (int32_t ih = 0; ih < p.n_head_kv; ++ih) {
            const int32_t * own = nearest.empty() ? nullptr : nearest.data() + ((size_t) il * p.n_head_kv + ih) * p.n_cells;
            m.join({ c, p.kept_row(il, ih), p.n_keep, own }, bucket_of(p, il, ih));
        }
    }
}

}  // namespace elastic
