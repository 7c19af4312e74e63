#include "core/layout.h"

#include "core/layer_shares.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace elastic {

int32_t run_ranks::tail_rank(int32_t cell) const {
    const auto it = std::lower_bound(tail.begin(), tail.end(), cell);
    return it != tail.end() && *it == cell ? first + n_body + (int32_t) (it - tail.begin()) : -1;
}

int32_t sink_cells(const selector & s, const plan_params & params) {
    return std::min(params.n_sink, params.n_keep - s.n_recent(params.n_keep));
}

protection protect_cells(const selector & s, const plan_params & params, const cells & c) {
    const int32_t n = c.size();
    protection    res{ std::vector<uint8_t>(n, 0), s.verbatim(params.n_keep, c) };
    auto &        stay = res.stay;
    std::fill(stay.begin(), stay.begin() + std::min(n, sink_cells(s, params)), 1);
    std::fill(stay.end() - std::min(n, s.n_recent(params.n_keep)), stay.end(), 1);
    for (int32_t i = 0; i < n; ++i) {
        stay[i] |= c.pinned[i] != 0;
    }
    int32_t n_free = params.n_keep - res.n_stay();
    for (int32_t i = n - 1; i >= 0 && n_free > 0; --i) {
        if (res.verbatim[i] && !stay[i]) {
            stay[i] = 1;
            n_free--;
        }
    }
    for (int32_t i = 0; i < n; ++i) {
        res.verbatim[i] |= c.pinned[i] != 0;
    }
    if (res.n_stay() > params.n_keep) {
        throw error("[select] " + std::to_string(res.n_stay()) + " cells must stay, got n_keep = " + std::to_string(params.n_keep));
    }
    return res;
}

namespace {

// the run without the cells masked in a layer; so far its protected cells stay
run run_of_layer(const run & r, const cells & c, int32_t il) {
    run res;
    res.image = r.image;
    for (size_t k = 0; k < r.cells.size(); ++k) {
        if (!c.is_masked(il, r.cells[k])) {
            res.cells.push_back(r.cells[k]);
            res.stay.push_back(r.stay[k]);
            res.verbatim.push_back(r.verbatim[k]);
            res.n_stay += r.stay[k];
        }
    }
    res.n_keep = res.n_stay;
    return res;
}

// a run that is kept whole, in each layer  [n_layer]
std::vector<run> whole_run(const run & r, const cells & c, int32_t n_layer) {
    std::vector<run> res;
    for (int32_t il = 0; il < n_layer; ++il) {
        res.push_back(run_of_layer(r, c, il));
        res.back().n_keep = (int32_t) res.back().cells.size();
    }
    return res;
}

// the run as each layer has it, on average with what is meant for it and n_more cells, or fewer where there are not as many; in none
// with more than `most` times what is meant for it, the protected cells aside  [n_layer]
std::vector<run> share_run(const run & r, const cells & c, const std::vector<float> & share, int32_t n_more, double most) {
    const int32_t n_free = r.n_keep - r.n_stay;
    const auto    limit  = (int32_t) std::min((double) r.cells.size(), n_free * most);

    std::vector<run>     res;
    std::vector<int32_t> room;
    for (size_t il = 0; il < share.size(); ++il) {
        res.push_back(run_of_layer(r, c, (int32_t) il));
        room.push_back(std::min(limit, (int32_t) res.back().cells.size() - res.back().n_stay));
    }
    const auto n_own = cells_of_layers(n_free + n_more, share, room);
    for (size_t il = 0; il < share.size(); ++il) {
        res[il].n_keep += n_own[il];
    }
    return res;
}

int64_t n_total(const std::vector<run> & of_layers) {
    return std::accumulate(of_layers.begin(), of_layers.end(), (int64_t) 0, [](int64_t n, const run & own) { return n + own.n_keep; });
}

// All runs as each layer has them, n_keep cells on average. What is meant for a run of which layers hold fewer goes to the
// others  [runs][n_layer]
std::vector<std::vector<run>> share_runs(const plan_params & params, const cells & c, const std::vector<float> & share,
                                         const std::vector<run> & runs) {
    const auto   n_layer = (int32_t) share.size();
    const double most    = params.n_rank_max > 0 ? std::max(1.0, (double) params.n_rank_max / params.n_keep) : HUGE_VAL;
    int64_t      n_left  = (int64_t) params.n_keep * n_layer;

    std::vector<std::vector<run>> res;
    for (const auto & r : runs) {
        res.push_back(r.whole() ? whole_run(r, c, n_layer) : share_run(r, c, share, 0, most));
        n_left -= n_total(res.back());
    }
    for (size_t r = 0; r < runs.size() && !c.masked.empty() && n_left >= n_layer; ++r) {
        if (runs[r].whole()) {
            continue;
        }
        const int64_t before = n_total(res[r]);
        res[r]               = share_run(runs[r], c, share, (int32_t) (n_left / n_layer), most);
        n_left -= n_total(res[r]) - before;
    }
    return res;
}

bool held_by_any(const cells & c, int32_t n_layer, int32_t cell) {
    for (int32_t il = 0; il < n_layer; ++il) {
        if (!c.is_masked(il, cell)) {
            return true;
        }
    }
    return false;
}

// place of the first cell of the tail: whole runs are all tail, others have the protected cells that they end with
size_t tail_begin(const run & r, bool ranked, bool fixed) {
    if (fixed) {
        return 0;
    }
    if (ranked) {  // all protected cells behind the first ones
        return (size_t) r.n_leading();
    }
    size_t k = r.cells.size();
    while (k > 0 && r.stay[k - 1]) {
        --k;
    }
    return k;
}

run_ranks rank_run(const layout & l, size_t index, const cells & c) {
    const run &  r         = l.runs[index];
    const auto & of_layers = l.of_layers[index];
    const bool   fixed     = l.is_fixed(index);

    run_ranks res;
    res.first = l.n_ranks;
    for (size_t k = tail_begin(r, l.ranked, fixed); k < r.cells.size(); ++k) {
        if ((fixed || r.stay[k]) && held_by_any(c, (int32_t) of_layers.size(), r.cells[k])) {
            res.tail.push_back(r.cells[k]);
        }
    }
    for (const auto & own : of_layers) {
        const auto n_tail = std::count_if(own.cells.begin(), own.cells.end(), [&](int32_t cell) { return res.tail_rank(cell) >= 0; });
        res.n_body        = std::max(res.n_body, own.n_keep - (int32_t) n_tail);
    }
    return res;
}

}  // namespace

layout lay_out(const selector & s, bool ranked, const plan_params & params, const std::vector<float> & share, const cells & c) {
    layout res;
    res.ranked    = ranked;
    res.protect   = protect_cells(s, params, c);
    res.runs      = s.runs(res.protect, c, params.n_keep);
    res.of_layers = share_runs(params, c, share, res.runs);
    for (size_t r = 0; r < res.runs.size(); ++r) {
        res.ranks.push_back(rank_run(res, r, c));
        res.n_ranks += res.ranks.back().n_keep();
    }
    return res;
}

}  // namespace elastic
