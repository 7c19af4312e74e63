// Before a prompt of text is compressed, its answer is tried for a few tokens, which are then taken back: what the answer is going
// to look at becomes part of the importance.

#include "runtime/elastic_cache.h"

#include "llama-context.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <functional>

namespace elastic {

// Cells that have to leave for each token that is tried, unless the caller says how many to try: on a CPU a token takes as long as
// about eight of a prompt, so that this is a third of the prompt's time at most.
static constexpr int32_t CELLS_PER_TRY = 24;

namespace {

struct attempt {
    llama_seq_id seq_id;
    llama_token  next;
    llama_pos    first;  // position of the first token
    int32_t      n_left;
};

struct token_batch {
    llama_batch batch;

    explicit token_batch(int32_t n) : batch(llama_batch_init(n, 0, 1)) {}
    ~token_batch() { llama_batch_free(batch); }
    token_batch(const token_batch &)             = delete;
    token_batch & operator=(const token_batch &) = delete;

    void add(llama_token token, llama_pos pos, llama_seq_id seq_id) {
        const int32_t i    = batch.n_tokens++;
        batch.token[i]     = token;
        batch.pos[i]       = pos;
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = seq_id;
        batch.logits[i]    = 1;
    }
};

struct at_end {
    std::function<void()> fn;

    ~at_end() { fn(); }
};

}  // namespace

// tokens to try; 0: an image is among the cells (its answer looks from one patch to another, and what it begins with says little
// of the rest), or too few leave for it to pay
int32_t elastic_cache::n_to_try(llama_seq_id seq_id, int32_t n_seqs) const {
    if (!active() || !store->has_mass() || !sequence(seq_id).pending || is_waiting(seq_id) || cfg.delay > 0) {
        return 0;
    }
    const uint32_t strm = kv.get_stream(seq_id);
    const auto     all  = logical_cells(seq_id);
    if (std::any_of(all.begin(), all.end(), [&](int32_t cell) { return store->kind(strm, cell) == cell_kind::image; })) {
        return 0;
    }
    const int32_t n_own    = average(held_rows(strm, own_cells(seq_id)));
    const int32_t n_shared = n_held(seq_id) - n_own;
    const int32_t n_gone   = n_own - std::max(1, target_cells(sequence(seq_id).n_tokens) - n_shared);
    if (n_gone <= 0) {
        return 0;
    }
    const int32_t n_wanted = cfg.lookahead >= 0 ? cfg.lookahead : std::min(cfg.pol.lookahead(), n_gone / CELLS_PER_TRY);

    const int32_t n_room = (shape.kv_size - (int32_t) kv.get_cells(seq_id).get_used()) / n_seqs;
    return std::max(0, std::min({ n_wanted, n_room, room_under_cap(seq_id) }));
}

void elastic_cache::take_back(llama_seq_id seq_id, llama_pos p0) {
    auto & st = seqs[seq_id];
    if (p0 <= st.pos_moved) {
        throw error("[take_back] sequence " + std::to_string(seq_id) + ": got position " + std::to_string(p0) +
                    ", expected one of a prompt that is not compressed yet");
    }
    taking_back = true;
    kv.seq_rm(seq_id, p0, -1);
    taking_back    = false;
    st.pos_changed = p0 - 1;  // the scores are the prompt's as it is now
}

int32_t elastic_cache::look_ahead(const std::vector<llama_seq_id> & seq_ids, const std::vector<llama_token> & tokens) {
    const llama_vocab * vocab   = llama_model_get_vocab(&ctx.get_model());
    const int32_t       n_vocab = llama_vocab_n_tokens(vocab);
    const auto          refuse  = [](const std::string & what) {
        throw error("[elastic_look_ahead] " + what);
    };
    if (seq_ids.size() != tokens.size() || seq_ids.size() > ctx.n_batch()) {
        refuse("got " + std::to_string(seq_ids.size()) + " sequences and " + std::to_string(tokens.size()) +
               " tokens, expected as many of both, at most n_batch = " + std::to_string(ctx.n_batch()));
    }

    std::vector<attempt> attempts;
    for (size_t i = 0; i < seq_ids.size(); ++i) {
        check_seq_id(seq_ids[i]);
        if (tokens[i] < 0 || tokens[i] >= n_vocab) {
            refuse("token: got " + std::to_string(tokens[i]) + ", expected 0 <= token < " + std::to_string(n_vocab));
        }
        if (std::count(seq_ids.begin(), seq_ids.end(), seq_ids[i]) > 1) {
            refuse("seq_id: got " + std::to_string(seq_ids[i]) + " more than once");
        }
        const int32_t n = n_to_try(seq_ids[i], (int32_t) seq_ids.size());
        if (n > 0 && !llama_vocab_is_eog(vocab, tokens[i])) {
            attempts.push_back({ seq_ids[i], tokens[i], kv.seq_pos_max(seq_ids[i]) + 1, n });
        }
    }
    if (attempts.empty()) {
        return 0;
    }

    take_logits();

    const int64_t t_start = ggml_time_us();
    const bool    held    = hold;
    int32_t       n_tried = 0;
    const at_end  restore = { [&] {
        hold              = held;
        trying            = false;
        for (const auto & a : attempts) {
            take_back(a.seq_id, a.first);
        }
        stats.n_tried += n_tried;
        stats.t_look_us += ggml_time_us() - t_start;
    } };

    hold   = true;  // to the sequence they are more of the prompt
    trying = true;
    token_batch step((int32_t) attempts.size());
    for (bool going = true; going;) {
        step.batch.n_tokens = 0;
        std::vector<attempt *> rows;
        for (auto & a : attempts) {
            if (a.n_left > 0) {
                step.add(a.next, kv.seq_pos_max(a.seq_id) + 1, a.seq_id);
                rows.push_back(&a);
            }
        }
        going = !rows.empty() && llama_decode(&ctx, step.batch) == 0;
        n_tried += going;
        for (size_t i = 0; going && i < rows.size(); ++i) {
            const float * logits = llama_get_logits_ith(&ctx, (int32_t) i);
            if (!logits) {
                going = false;
                break;
            }
            rows[i]->next   = (llama_token) (std::max_element(logits, logits + n_vocab) - logits);
            rows[i]->n_left = llama_vocab_is_eog(vocab, rows[i]->next) ? 0 : rows[i]->n_left - 1;
        }
    }
    return n_tried;
}

}  // namespace elastic
