#include "runtime/kv_view.h"

#include "runtime/kv_cells.h"

#include "kernels/kv_rows.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <tuple>

namespace elastic {

//
// the shape
//

static kv_shape read_shape(const llama_context & ctx, const llama_kv_cache & kv) {
    const auto & hparams = ctx.get_model().hparams;

    kv_shape shape;
    for (const uint32_t il : kv.get_layer_ids()) {
        if (hparams.n_head_kv(il) > 0) {  // others have no attention
            shape.layer_ids.push_back((int32_t) il);
        }
    }
    shape.n_layer_model = (int32_t) hparams.n_layer();
    shape.n_layer       = (int32_t) shape.layer_ids.size();
    shape.n_users.assign(shape.n_layer, 0);
    for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
        const auto it = std::find(shape.layer_ids.begin(), shape.layer_ids.end(), kv.layer_owner(il));
        shape.owners.push_back(it == shape.layer_ids.end() ? -1 : (int32_t) (it - shape.layer_ids.begin()));
        if (shape.owners.back() >= 0) {
            shape.n_users[shape.owners.back()]++;
        }
    }
    shape.kv_size  = (int32_t) kv.get_size();
    shape.n_stream = (int32_t) kv.get_n_stream();

    for (int32_t i = 0; i < shape.n_layer; ++i) {
        const int32_t il = shape.layer_ids[i];

        const int32_t n_head    = (int32_t) hparams.n_head(il);
        const int32_t n_head_kv = (int32_t) hparams.n_head_kv(il);
        const int32_t d_k       = (int32_t) hparams.n_embd_head_k(il);
        const int32_t d_v       = (int32_t) hparams.n_embd_head_v(il);
        if (i > 0 && (n_head != shape.n_head || n_head_kv != shape.n_head_kv || d_k != shape.n_embd_head_k || d_v != shape.n_embd_head_v)) {
            throw unsupported("[elastic_attach] layers " + std::to_string(shape.layer_ids[0]) + " and " + std::to_string(il) +
                              " have different numbers or sizes of heads, and one plan holds for all; run this model with the elastic "
                              "cache off");
        }
        shape.n_head        = n_head;
        shape.n_head_kv     = n_head_kv;
        shape.n_embd_head_k = d_k;
        shape.n_embd_head_v = d_v;

        shape.cell_bytes += (int64_t) ggml_row_size(kv.type_k(), (int64_t) d_k * n_head_kv) +
                            (int64_t) ggml_row_size(kv.type_v(), (int64_t) d_v * n_head_kv);
    }
    return shape;
}

static void check_cache(const llama_kv_cache & kv, const kv_shape & shape) {
    if (shape.n_layer == 0) {
        throw unsupported("[elastic_attach] no layer of the model attends to a KV cache; run this model with the elastic cache off");
    }
    if (kv.get_v_trans()) {
        throw unsupported(
            "[elastic_attach] V is stored transposed, as it is without flash attention; make the context with flash_attn_type = "
            "LLAMA_FLASH_ATTN_TYPE_ENABLED");
    }
    for (const auto & [name, type, size] :
         { std::make_tuple("K", kv.type_k(), shape.n_embd_head_k), std::make_tuple("V", kv.type_v(), shape.n_embd_head_v) }) {
        if (!rows_supported(type)) {
            throw unsupported("[elastic_attach] " + std::string(name) + " cache type " + ggml_type_name(type) + " is not supported");
        }
        if (size % ggml_blck_size(type) != 0) {
            throw unsupported("[elastic_attach] heads of " + std::to_string(size) + " elements with a " + name + " cache of type " +
                              ggml_type_name(type) + ", whose blocks have " + std::to_string(ggml_blck_size(type)) + ", are not supported");
        }
    }
}

kv_view::kv_view(llama_context & ctx) : parts(ctx), shape(read_shape(ctx, *parts.attention)), ctx(ctx), kv(*parts.attention) {
    check_cache(kv, shape);
}

void kv_view::settle() const {
    ctx.memory_update(false);
    ctx.synchronize();
}

void kv_view::synchronize() const {
    ctx.synchronize();
}

void log_error(const std::string & text) {
    LLAMA_LOG_ERROR("[elastic] %s\n", text.c_str());
}

//
// cells
//

int32_t kv_view::n_seq_max() const {
    return (int32_t) kv.get_n_seq_max();
}

uint32_t kv_view::stream(llama_seq_id seq_id) const {
    return kv.get_stream(seq_id);
}

int32_t kv_view::n_used(uint32_t strm) const {
    return (int32_t) kv.get_cells_mut(strm).used_max_p1();
}

int32_t kv_view::n_free(llama_seq_id seq_id) const {
    return shape.kv_size - (int32_t) kv.get_cells(seq_id).get_used();
}

bool kv_view::is_free(uint32_t strm, int32_t row) const {
    return kv.get_cells_mut(strm).is_empty(row);
}

bool kv_view::is_shared(uint32_t strm, int32_t row) const {
    return kv.get_cells_mut(strm).seq_count(row) > 1;
}

bool kv_view::has(uint32_t strm, int32_t row, llama_seq_id seq_id) const {
    const auto & cells = kv.get_cells_mut(strm);
    return !cells.is_empty(row) && cells.seq_has(row, seq_id);
}

llama_pos kv_view::pos(uint32_t strm, int32_t row) const {
    return kv.get_cells_mut(strm).pos_get(row);
}

bool kv_view::empty() const {
    for (int32_t s = 0; s < shape.n_stream; ++s) {
        if (kv.get_cells_mut(s).get_used() > 0) {
            return false;
        }
    }
    return true;
}

int32_t kv_view::n_cells(llama_seq_id seq_id) const {
    return (int32_t) kv.get_cells(seq_id).seq_pos_get(seq_id).size();
}

int32_t kv_view::n_cells(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    const auto & all = kv.get_cells(seq_id).seq_pos_get(seq_id);
    return (int32_t) std::distance(all.lower_bound({ p0, 0 }), all.lower_bound({ p1, 0 }));
}

llama_pos kv_view::pos_max(llama_seq_id seq_id) const {
    return kv.seq_pos_max(seq_id);
}

llama_pos kv_view::pos_next(llama_seq_id seq_id) const {
    const auto &   all  = kv.get_cells(seq_id).seq_pos_get(seq_id);
    const uint32_t strm = stream(seq_id);
    llama_pos      res  = 0;
    for (auto it = all.rbegin(); it != all.rend() && it->first == all.rbegin()->first; ++it) {
        res = std::max(res, place(strm, (int32_t) it->second).next());
    }
    return res;
}

// llama.cpp has them by position, and those of one position by row, which wraps round
std::vector<int32_t> kv_view::rows(llama_seq_id seq_id) const {
    std::vector<int32_t> res;
    const auto &         cells = kv.get_cells(seq_id);
    const auto &         all   = cells.seq_pos_get(seq_id);
    for (auto it = all.begin(); it != all.end();) {
        const auto first = res.size();
        const auto pos   = it->first;
        const auto later = [&](int32_t a, int32_t b) {
            return cells.ext_get(b).is_2d_gt(cells.ext_get(a).x, cells.ext_get(a).y);
        };
        for (; it != all.end() && it->first == pos; ++it) {
            res.push_back((int32_t) it->second);
        }
        std::stable_sort(res.begin() + first, res.end(), later);
    }
    return res;
}

std::vector<int32_t> kv_view::own_rows(llama_seq_id seq_id) const {
    std::vector<int32_t> res;
    for (const int32_t row : rows(seq_id)) {
        if (!is_shared(stream(seq_id), row)) {
            res.push_back(row);
        }
    }
    return res;
}

cell_place kv_view::place(uint32_t strm, int32_t row) const {
    return place_of(kv.get_cells_mut(strm), row);
}

placed_cells placed_in(const llama_memory_context_i & mctx) {
    const auto & sinfo = memory_parts::attention_of(mctx).get_slot_info();

    placed_cells res;
    res.n_stream    = (int32_t) sinfo.n_stream();
    res.n_of_stream = (int32_t) sinfo.size();
    for (size_t s = 0; s < sinfo.n_stream(); ++s) {
        res.strm.push_back((uint32_t) sinfo.strm[s]);
        res.rows.emplace_back(sinfo.idxs[s].begin(), sinfo.idxs[s].end());
    }
    return res;
}

//
// changes
//

void kv_view::free_row(uint32_t strm, int32_t row) {
    kv.get_cells_mut(strm).rm(row);
}

bool kv_view::remove(uint32_t strm, int32_t row, llama_seq_id seq_id) {
    return kv.get_cells_mut(strm).seq_rm(row, seq_id);
}

void kv_view::put(uint32_t strm, int32_t row, const cell_place & place, llama_seq_id seq_id) {
    put_cell(kv.get_cells_mut(strm), row, place, seq_id);
}

void kv_view::search_from(uint32_t strm, int32_t row) {
    kv.set_head(strm, row);
}

void kv_view::cut(llama_seq_id seq_id, llama_pos p0) {
    ctx.get_memory()->seq_rm(seq_id, p0, -1);
}

//
// K and V
//

ggml_tensor * kv_view::k(int32_t il) const {
    return kv.get_k_storage(shape.layer_ids[il]);
}

ggml_tensor * kv_view::v(int32_t il) const {
    return kv.get_v_storage(shape.layer_ids[il]);
}

}  // namespace elastic
