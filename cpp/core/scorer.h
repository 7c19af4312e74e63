#pragma once

// What is a cell worth? One float per layer, KV head and cell; higher = keep.

#include "core/statistics.h"

#include <functional>
#include <string>

namespace elastic {

// what a scorer may look at
struct score_view {
    const cells &          c;           // kinds, pinned cells, tokens that cells stand for, what came in earlier turns
    const importance_map & importance;  // its shape is always set, its values only where needs() asks for them
    const row_source *     rows;        // K and V, set where needs() asks for them
    int32_t                n_threads;   // layers may be shared between them

    int32_t  n_layer() const { return importance.sum.n_layer; }
    int32_t  n_head_kv() const { return importance.sum.n_head_kv; }
    int32_t  n_cells() const { return c.size(); }
    // a map to fill
    head_map zeros() const { return head_map(n_layer(), n_head_kv(), n_cells()); }
};

class scorer {
  public:
    virtual ~scorer() = default;

    virtual const char * name() const = 0;
    virtual statistics   needs() const { return {}; }
    // whether scores stand for expected attention: never negative, and twice as much is worth twice as much
    virtual bool         is_attention() const { return false; }
    // pure; finite  [n_layer][n_head_kv][n_cells]
    virtual head_map     score(const score_view & v) const = 0;
};

// A scorer from outside, such as one written in Python. make_plan refuses scores of another shape, and those that are not finite.
class external_scorer : public scorer {
  public:
    using function = std::function<head_map(const score_view &)>;

    external_scorer(function fn, const statistics & wanted) : fn(std::move(fn)), wanted(wanted) {}

    const char * name() const override { return "external"; }
    statistics   needs() const override { return wanted; }
    bool         is_attention() const override { return true; }  // make_plan checks the sign
    head_map     score(const score_view & v) const override { return fn(v); }

  private:
    function   fn;
    statistics wanted;
};

}  // namespace elastic
