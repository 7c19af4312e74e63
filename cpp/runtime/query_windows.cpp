#include "runtime/query_windows.h"

#include <algorithm>

namespace elastic {

query_windows::query_windows(int32_t n_layer, int32_t n_head_kv, int32_t kv_size, int32_t n_window)
    : n_window(n_window), n_layer(n_layer), n_head_kv(n_head_kv), kv_size(kv_size) {}

void query_windows::begin_query(llama_seq_id seq_id) {
    auto & window = windows[seq_id];
    query  next;
    if ((int32_t) window.size() == n_window) {
        next = std::move(window.back());
        window.pop_back();
    }
    if (next && next.use_count() == 1) {
        next->clear();
    } else {
        next = make();
    }
    window.push_front(std::move(next));
}

float * query_windows::row(llama_seq_id seq_id, int32_t ago, int32_t il, int32_t ih) {
    return windows.at(seq_id)[ago]->row(il * n_head_kv + ih);
}

void query_windows::reset_cell(llama_seq_id seq_id, int32_t cell) {
    const auto it = windows.find(seq_id);
    if (it == windows.end()) {
        return;
    }
    for (const auto & q : it->second) {  // whoever else has it: its query saw no token that comes after it
        for (int32_t r = 0; r < n_rows(); ++r) {
            if (q->row(r)[cell] != 0.0f) {  // most have never been written, and take no memory
                q->row(r)[cell] = 0.0f;
            }
        }
    }
}

void query_windows::copy(llama_seq_id seq_id_src, llama_seq_id seq_id_dst) {
    const auto it = windows.find(seq_id_src);
    if (it == windows.end()) {
        windows.erase(seq_id_dst);
    } else {
        windows[seq_id_dst] = it->second;
    }
}

head_map query_windows::take(const query & from, const std::vector<int32_t> & rows) const {
    head_map res(n_layer, n_head_kv, (int32_t) rows.size());
    from->gather(rows, res);
    return res;
}

std::vector<head_map> query_windows::gather(llama_seq_id seq_id, const std::vector<int32_t> & rows) const {
    std::vector<head_map> res;
    const auto            it = windows.find(seq_id);
    if (it != windows.end()) {
        for (const auto & q : it->second) {
            res.push_back(take(q, rows));
        }
    }
    return res;
}

head_map query_windows::sum(llama_seq_id seq_id, const std::vector<int32_t> & rows) const {
    if (!any()) {
        return {};
    }
    head_map   res(n_layer, n_head_kv, (int32_t) rows.size());
    const auto it = windows.find(seq_id);
    if (it == windows.end()) {
        return res;
    }
    for (auto q = it->second.rbegin(); q != it->second.rend(); ++q) {
        const head_map one = take(*q, rows);
        std::transform(one.data.begin(), one.data.end(), res.data.begin(), res.data.begin(), std::plus<>());
    }
    return res;
}

void query_windows::set(llama_seq_id seq_id, const std::vector<int32_t> & rows, const std::vector<head_map> & queries) {
    forget(seq_id);
    const int32_t n = std::min((int32_t) queries.size(), n_window);
    for (int32_t ago = n - 1; ago >= 0; --ago) {
        begin_query(seq_id);
        windows[seq_id].front()->scatter(rows, queries[ago]);
    }
}

}  // namespace elastic
