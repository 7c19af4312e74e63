#pragma once

#include "core/selector.h"

namespace elastic {

// Keeps the cells of highest score, and those that stay; ties go to the earlier cell.
choice choose_highest(const run & r, const float * score);

// The highest scores of all cells; the newest n_window cells stay, as far as they take no more than half of the kept cells.
class top_selector : public selector {
  public:
    explicit top_selector(const char * label = "top", int32_t n_window = 1) : label(label), n_window(n_window) {}

    const char * name() const override { return label; }
    int32_t      n_recent(int32_t n_keep) const override;
    choice       choose(const run & r, const float * score, head_rows &) const override { return choose_highest(r, score); }

  private:
    const char * label;
    int32_t      n_window;
};

// every cell stays
class all_selector : public selector {
  public:
    const char * name() const override { return "all"; }
    bool         keeps_all() const override { return true; }
    choice       choose(const run & r, const float * score, head_rows &) const override { return choose_highest(r, score); }
};

}  // namespace elastic
