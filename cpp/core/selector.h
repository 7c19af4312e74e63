#pragma once

// Which cells stay? A selector says which of them do not depend on a score, how many stay in each run of cells, and which.

#include "core/head_rows.h"
#include "core/runs.h"
#include "core/statistics.h"

namespace elastic {

// what a selector found in one run of one layer and head; a place is an index into run::cells
struct choice {
    std::vector<int32_t> kept;     // indices in the run, ascending
    std::vector<int32_t> nearest;  // the kept place nearest to each that is not, -1: none that may be joined; empty: not known
};

class selector {
  public:
    virtual ~selector() = default;

    virtual const char * name() const = 0;
    virtual statistics   needs() const { return {}; }
    virtual bool         keeps_all() const { return false; }
    // whether it multiplies scores, which then have to be expected attention
    virtual bool         weighs_scores() const { return false; }
    // whether it finds the neighbours of dropped cells on the way
    virtual bool         finds_neighbours() const { return false; }
    // whether the kept cells of a run may be put in the order of their scores
    virtual bool         can_rank() const { return true; }

    // newest cells that stay whatever their score, at least one
    virtual int32_t              n_recent(int32_t /*n_keep*/) const { return 1; }
    // 1: stays as it is, as far as there is room, and none joins it  [n_cells]
    virtual std::vector<uint8_t> verbatim(int32_t /*n_keep*/, const cells & c) const { return std::vector<uint8_t>(c.size(), 0); }
    // all cells, with how many of each run are kept; one run unless kinds are kept apart
    virtual std::vector<run>     runs(const protection & p, const cells & c, int32_t n_keep) const;
    // pure: run::n_keep cells, those that stay among them. `rows` is filled where needs() asks for them.
    virtual choice               choose(const run & r, const float * score, head_rows & rows) const = 0;
};

}  // namespace elastic
