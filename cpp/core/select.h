#pragma once

#include "core/policy.h"

namespace elastic {

// how many image cells and text cells stay when n_keep of the cells may (select_rule::image_first and cover)
//   all text stays while it leaves image cells at least half of their proportional share
//   (n_keep*n_image/(2*n_cells), rounded down); otherwise the image gets that share and text the rest
struct split {
    int32_t n_text  = 0;
    int32_t n_image = 0;
};
split split_budget(int32_t n_keep, int32_t n_text, int32_t n_image);
// and where there are earlier turns (cells::has_past): the image keeps the cells that it has, as far as the present question and the
// older text's share, in proportion to the tokens it stands for, leave them; half of the image's own share at least
split split_with_past(int32_t n_keep, const cells & c);

// protected places at either end: first cells, and last cells (at least one)
int32_t sink_cells(select_rule rule, const plan_params & params);
int32_t recent_cells(select_rule rule, const plan_params & params);

// select_rule::cover: 1 for the cells that stay as they are. Of the last text_recent cells (n_keep/4 at most) those that are no
// image, and the first image_start cells of each image (n_keep/4 of all images at most)  [n_cells]
std::vector<uint8_t> cells_apart(const plan_params & params, const cells & c);

// 1 for the cells that stay whatever their score  [n_cells]
std::vector<uint8_t> protected_cells(select_rule rule, const plan_params & params, const cells & c);

// neighboring cells that share one number of kept cells, the same in all layers and heads: so rank j is of one kind everywhere
struct segment {
    std::vector<int32_t> cells;    // logical indices, ascending
    std::vector<uint8_t> protect;  // [cells]
    bool                 image     = false;
    int32_t              n_protect = 0;
    int32_t              n_keep    = 0;
    int64_t              n_tokens  = 0;  // that its unprotected cells stand for
};
// in logical order, which is the order of their ranks
std::vector<segment> shared_segments(select_rule rule, const cells & c, const std::vector<uint8_t> & protect, int32_t n_keep);

// image_first and cover work on runs of neighbouring cells of one kind: the kind's number of cells is shared between its runs in
// proportion to their unprotected cells (rounded down, what is left over to the earlier runs), so that rank j is of the
// same kind in all layers and heads. Per layer and KV head the cells of highest score in a run stay.
//
// fills kept of the plan. Protected: the first n_sink cells, the last cell, pinned cells; with
// heavy_recent the last n_keep/2 cells, with window_top the last window_size (n_keep/2 at most), with cover cells_apart(),
// the later ones first, as far as there is room. Ties go to the earlier cell. If the protected cells alone exceed n_keep,
// elastic::error says so.
//   ranked: a run's ranks go by score, highest first, between the protected cells that it begins with and its
//   other protected cells: then the last of them is the least important one in every layer and head at once, and
//   may leave without moving anything. Otherwise ranks are in logical order.
void select_cells(select_rule rule, bool ranked, const plan_params & params, const cells & c, const head_map & score, plan & p);

// fills rank_score of a plan whose cells are settled: infinite for a rank that holds a protected cell in any head, or
// text of a run that was kept whole, which never leaves by its score
void sum_rank_scores(select_rule rule, const plan_params & params, const cells & c, const head_map & score, plan & p);

}  // namespace elastic
