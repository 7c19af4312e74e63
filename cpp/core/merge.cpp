#include "core/merge.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace elastic {

namespace {

// members of the buckets of one layer and head, anchors not included
struct groups {
    std::vector<int32_t> first;    // [n_keep + 1]
    std::vector<int32_t> members;  // logical indices, ascending within a bucket

    groups(const int32_t * bucket, const int32_t * kept, int32_t n_cells, int32_t n_keep) : first(n_keep + 1, 0) {
        const auto joins = [&](int32_t i) {
            return bucket[i] >= 0 && kept[bucket[i]] != i;
        };
        for (int32_t i = 0; i < n_cells; ++i) {
            if (joins(i)) {
                first[bucket[i] + 1]++;
            }
        }
        std::partial_sum(first.begin(), first.end(), first.begin());
        members.resize(first[n_keep]);
        std::vector<int32_t> next(first.begin(), first.end() - 1);
        for (int32_t i = 0; i < n_cells; ++i) {
            if (joins(i)) {
                members[next[bucket[i]]++] = i;
            }
        }
    }
};

// sum(w_i x_i) / sum(w_i) over the rows of x [weights][d]; in f64, so that the order of the rows does not show
void weighted_mean(const std::vector<float> & x, int32_t d, const std::vector<float> & weights, float * dst) {
    std::vector<double> sum(d, 0.0);
    double              total = 0.0;
    for (size_t k = 0; k < weights.size(); ++k) {
        const double  w   = weights[k];
        const float * row = x.data() + k * d;
        for (int32_t e = 0; e < d; ++e) {
            sum[e] += w * row[e];
        }
        total += w;
    }
    for (int32_t e = 0; e < d; ++e) {
        dst[e] = (float) (sum[e] / total);
    }
}

// weights of a mean that lies at `share` of the way from the first row to the mean by `weights`
std::vector<float> towards(const std::vector<float> & weights, float share) {
    std::vector<float> res;
    for (const float w : weights) {
        res.push_back(share * w);
    }
    res[0] += (1.0f - share) * std::accumulate(weights.begin(), weights.end(), 0.0f);
    return res;
}

// what an anchor's log weight without its bias, which is linear in its key, loses on the way to the mean key
double log_weight_lost(const float * weight, const float * bias, const std::vector<int32_t> & members, const std::vector<float> & weights) {
    const auto of_key = [&](int32_t i) {
        return (weight[members[0]] > 0.0f ? std::log((double) weight[i]) : 0.0) - bias[i];
    };
    double res = 0.0;
    double sum = 0.0;
    for (size_t k = 0; k < members.size(); ++k) {
        if (weights[k] > 0.0f) {
            res += weights[k] * (of_key(members[0]) - of_key(members[k]));
            sum += weights[k];
        }
    }
    return res / sum;
}

// one head of K or V on its way: what only moves as stored bytes, what is merged as f32
class moving_rows {
  public:
    // moved: the rows of the kept cells
    moving_rows(const kv_rows & t, const std::vector<int32_t> & rows_src, const std::vector<int32_t> & moved, int32_t ih)
        : t(t), ih(ih), rows_src(rows_src) {
        raw.resize(moved.size() * head_bytes(t));
        read_raw(t, moved, ih, raw.data());
    }

    void merge(int32_t row_dst, const std::vector<int32_t> & members, const std::vector<float> & weights) {
        rows_members.clear();
        for (const int32_t i : members) {
            rows_members.push_back(rows_src[i]);
        }
        of_members.resize(members.size() * t.n_embd_head);
        read_f32(t, rows_members, ih, of_members.data());
        rows_merged.push_back(row_dst);
        merged.resize(rows_merged.size() * t.n_embd_head);
        weighted_mean(of_members, t.n_embd_head, weights, merged.data() + merged.size() - t.n_embd_head);
    }

    void write(const std::vector<int32_t> & rows_dst) {
        write_raw(t, rows_dst, ih, raw.data());
        write_f32(t, rows_merged, ih, merged.data());
    }

  private:
    const kv_rows &              t;
    const int32_t                ih;
    const std::vector<int32_t> & rows_src;
    std::vector<uint8_t>         raw;  // [moved][head_bytes]
    std::vector<int32_t>         rows_members;
    std::vector<float>           of_members;  // [rows_members][n_embd_head]
    std::vector<int32_t>         rows_merged;
    std::vector<float>           merged;  // [rows_merged][n_embd_head]
};

void check_shape(const kv_rows & t, const plan & p, const char * what) {
    if (t.n_head_kv != p.n_head_kv) {
        throw error(std::string("[merge_layer] ") + what + ": got " + std::to_string(t.n_head_kv) + " KV heads, expected " +
                    std::to_string(p.n_head_kv));
    }
    if (!rows_supported(t.type)) {
        throw error(std::string("[merge_layer] ") + what + ": got type " + ggml_type_name(t.type) + ", which is not supported");
    }
}

void check_rows(const std::vector<int32_t> & rows, const kv_rows & k, const kv_rows & v, const char * what) {
    const int64_t n_rows = std::min(k.n_rows, v.n_rows);
    for (const int32_t row : rows) {
        if (row < 0 || row >= n_rows) {
            throw error(std::string("[merge_layer] ") + what + ": got " + std::to_string(row) + ", expected 0 <= row < " +
                        std::to_string(n_rows));
        }
    }
}

// one layer and head
class head_merge {
  public:
    head_merge(const plan & p, merging how, int32_t il, int32_t ih, const cell_state & in, cell_state & out)
        : p(p), how(how), kept(p.kept_row(il, ih)), g(p.bucket_row(il, ih), kept, p.n_cells, p.n_keep),
          importance(in.importance.row(il, ih)), count(in.count.row(il, ih)), bias(in.bias.row(il, ih)),
          weight(how == merging::biased ? p.weight.row(il, ih) : nullptr), importance_out(out.importance.row(il, ih)),
          count_out(out.count.row(il, ih)), bias_out(out.bias.row(il, ih)) {}

    void run(const kv_rows & k, const kv_rows & v, int32_t ih, const std::vector<int32_t> & rows_src,
             const std::vector<int32_t> & rows_dst) {
        std::vector<int32_t> moved, to;
        for (int32_t j = 0; j < p.n_keep; ++j) {
            if (kept[j] >= 0) {
                moved.push_back(rows_src[kept[j]]);
                to.push_back(rows_dst[j]);
            }
        }
        // everything is read before anything is written, so rows may move anywhere
        moving_rows head_k(k, rows_src, moved, ih);
        moving_rows head_v(v, rows_src, moved, ih);
        for (int32_t j = 0; j < p.n_keep; ++j) {
            if (kept[j] < 0) {
                importance_out[j] = 0.0f;
                count_out[j]      = 0.0f;
                bias_out[j]       = masked_bias;
            } else {
                merge_rank(j, rows_dst[j], head_k, head_v);
            }
        }
        head_k.write(to);
        head_v.write(to);
    }

  private:
    const plan &    p;
    const merging   how;
    const int32_t * kept;
    const groups    g;
    const float *   importance;
    const float *   count;
    const float *   bias;
    const float *   weight;
    float *         importance_out;
    float *         count_out;
    float *         bias_out;

    std::vector<int32_t> members;
    std::vector<float>   weights;

    void merge_rank(int32_t j, int32_t row_dst, moving_rows & head_k, moving_rows & head_v) {
        const int32_t anchor = kept[j];
        members.assign(1, anchor);
        if (how != merging::none) {
            members.insert(members.end(), g.members.begin() + g.first[j], g.members.begin() + g.first[j + 1]);
        }
        float importance_sum = 0.0f;
        float count_sum      = 0.0f;
        for (const int32_t i : members) {
            importance_sum += importance[i];
            count_sum += count[i];
        }
        importance_out[j] = importance_sum;
        count_out[j]      = count_sum;
        bias_out[j]       = bias[anchor];
        if (members.size() == 1) {
            return;
        }
        weights.clear();
        if (how == merging::mean) {
            for (const int32_t i : members) {
                weights.push_back(count[i]);
            }
            head_k.merge(row_dst, members, weights);
        } else {
            bias_out[j] = biased(anchor, row_dst, head_k);
        }
        head_v.merge(row_dst, members, weights);
    }

    // fills weights, moves the key, returns the bias
    float biased(int32_t anchor, int32_t row_dst, moving_rows & head_k) {
        // in f64: a quotient by a subnormal weight is infinite in f32
        double total = 0.0;
        for (const int32_t i : members) {
            weights.push_back(weight[anchor] > 0.0f ? weight[i] : 1.0f);
            total += weights.back();
        }
        double more = std::log(total / weights[0]);
        if (p.key_weight[anchor] > 0.0f) {
            more += p.key_weight[anchor] * log_weight_lost(weight, bias, members, weights);
            head_k.merge(row_dst, members, towards(weights, p.key_weight[anchor]));
        }
        return (float) (bias[anchor] + more);
    }
};

}  // namespace

void merge_layer(const plan & p, const combiner & m, int32_t il, const kv_rows & k, const kv_rows & v,
                 const std::vector<int32_t> & rows_src, const std::vector<int32_t> & rows_dst, const cell_state & in, cell_state & out) {
    if ((int32_t) rows_src.size() != p.n_cells || (int32_t) rows_dst.size() != p.n_keep) {
        throw error("[merge_layer] rows: got " + std::to_string(rows_src.size()) + " and " + std::to_string(rows_dst.size()) +
                    ", expected " + std::to_string(p.n_cells) + " and " + std::to_string(p.n_keep));
    }
    if (m.how() == merging::biased && ((int32_t) p.key_weight.size() != p.n_cells || p.weight.n_cells != p.n_cells)) {
        throw error("[merge_layer] weights: the plan has none for its " + std::to_string(p.n_cells) + " cells");
    }
    check_shape(k, p, "K");
    check_shape(v, p, "V");
    check_rows(rows_src, k, v, "rows_src");
    check_rows(rows_dst, k, v, "rows_dst");
    for (int32_t ih = 0; ih < p.n_head_kv; ++ih) {
        head_merge(p, m.how(), il, ih, in, out).run(k, v, ih, rows_src, rows_dst);
    }
}

}  // namespace elastic
