#pragma once

// What the parts of a policy look at, and the form they get it in.

#include "core/types.h"

namespace elastic {

// what the runtime has to keep of every cell, or hand over at a compression
struct statistics {
    bool    sum      = false;  // attention received from all queries
    int32_t n_window = 0;      // attention received from as many last queries
    float   decay    = 0.0f;   // attention received, a query's weight shrinking by this factor with every one after it; text only
    bool    rows     = false;  // K and V

    bool recent() const { return n_window > 0 || decay > 0.0f; }
};

// What two parts need together. Throws elastic::error where they want recent attention in different forms: one is kept.
statistics operator|(const statistics & a, const statistics & b);

// Adds the attention of one query head to what its KV head received: dst[i] += src[i] / n_parts where used[i] is 1, not 0  [n]
void add_share(float * dst, const float * src, const float * used, int32_t n, int32_t n_parts);

// `recent` is empty (n_cells == 0) where nothing needs it
struct importance_map {
    head_map sum;     // attention received from all queries  [n_layer][n_head_kv][n_cells]
    head_map recent;  // from the last ones, see statistics
};

// keys and values as f32, on demand
struct row_source {
    virtual ~row_source()                                             = default;
    virtual int32_t n_embd_head_k() const                             = 0;
    virtual int32_t n_embd_head_v() const                             = 0;
    // fill dst [n_cells][n_embd_head]
    virtual void    load_k(int32_t il, int32_t ih, float * dst) const = 0;
    virtual void    load_v(int32_t il, int32_t ih, float * dst) const = 0;
};

}  // namespace elastic
