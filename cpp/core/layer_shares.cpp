#include "core/layer_shares.h"

#include <algorithm>
#include <numeric>

namespace elastic {

std::vector<int32_t> cells_of_layers(int32_t n_average, const std::vector<float> & share, const std::vector<int32_t> & room) {
    const size_t         n_layer = share.size();
    std::vector<int32_t> res(n_layer, 0);
    int64_t              n_left = (int64_t) n_average * (int64_t) n_layer;

    std::vector<size_t> open;  // layers with room, the largest share first
    for (size_t il = 0; il < n_layer; ++il) {
        if (n_average > 0 && room[il] > 0) {
            res[il] = 1;
            n_left--;
            open.push_back(il);
        }
    }
    std::stable_sort(open.begin(), open.end(), [&](size_t a, size_t b) { return share[a] > share[b]; });

    while (n_left > 0) {
        open.erase(std::remove_if(open.begin(), open.end(), [&](size_t il) { return res[il] >= room[il]; }), open.end());
        if (open.empty()) {
            break;
        }
        const double  total    = std::accumulate(open.begin(), open.end(), 0.0, [&](double x, size_t il) { return x + share[il]; });
        const int64_t n_shared = n_left;
        for (const size_t il : open) {
            const auto part = (int64_t) ((double) n_shared * share[il] / total);
            const auto more = (int32_t) std::min<int64_t>(part, room[il] - res[il]);
            res[il] += more;
            n_left -= more;
        }
        if (n_left == n_shared) {  // fewer than layers, all rounded down
            for (size_t i = 0; i < open.size() && n_left > 0; ++i, --n_left) {
                res[open[i]]++;
            }
        }
    }
    return res;
}

}  // namespace elastic
