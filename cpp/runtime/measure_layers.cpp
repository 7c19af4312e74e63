#include "runtime/measure_layers.h"

#include "runtime/attach.h"
#include "runtime/inspect.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>

namespace elastic {

namespace {

constexpr int32_t N_TOKENS  = 48;  // the text that is repeated
constexpr int32_t N_BEFORE  = 8;   // tokens of the repetition before the first query
constexpr int32_t N_QUERIES = 32;
constexpr int32_t N_CTX     = 128;

constexpr float MIN_SCORE = 0.015f;  // below is noise
// what the layer of the greatest score gets on top, in what a layer without any gets. Chosen on the dev scenes and texts with the
// embedded model
constexpr float EXTRA     = 3.0f;

using context_ptr = std::unique_ptr<llama_context, decltype(&llama_free)>;

context_ptr make_context(llama_model * model, int32_t n_threads) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = params.n_ubatch = N_CTX;
    params.n_seq_max                                = 1;
    params.n_threads = params.n_threads_batch = n_threads;
    params.flash_attn_type                    = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    params.no_perf                            = true;
    context_ptr res(llama_init_from_model(model, params), &llama_free);
    if (!res) {
        throw std::runtime_error("[elastic_measure_layers] llama.cpp made no context of " + std::to_string(N_CTX) + " cells");
    }
    return res;
}

// different tokens of text, the same ones for the same vocabulary
std::vector<llama_token> random_tokens(const llama_vocab * vocab) {
    const auto is_ordinary = [&](llama_token t) {
        const auto attr = llama_vocab_get_attr(vocab, t);
        return (attr & LLAMA_TOKEN_ATTR_NORMAL) && !(attr & LLAMA_TOKEN_ATTR_BYTE) && !llama_vocab_is_control(vocab, t) &&
               !llama_vocab_is_eog(vocab, t);
    };
    std::vector<llama_token> res(llama_vocab_n_tokens(vocab));
    std::iota(res.begin(), res.end(), 0);
    res.erase(std::remove_if(res.begin(), res.end(), [&](llama_token t) { return !is_ordinary(t); }), res.end());
    if ((int32_t) res.size() < N_TOKENS) {
        throw unsupported("[elastic_measure_layers] the vocabulary has " + std::to_string(res.size()) +
                          " ordinary tokens, expected at least " + std::to_string(N_TOKENS));
    }
    uint64_t seed = 1;
    for (int32_t i = 0; i < N_TOKENS; ++i) {  // Fisher-Yates, by Knuth's linear congruential generator
        seed = seed * 6364136223846793005ull + 1442695040888963407ull;
        std::swap(res[i], res[i + (seed >> 33) % (res.size() - i)]);
    }
    res.resize(N_TOKENS);
    return res;
}

void decode(llama_context * ctx, const std::vector<llama_token> & tokens, llama_pos past) {
    llama_batch batch = llama_batch_init((int32_t) tokens.size(), 0, 1);
    for (size_t i = 0; i < tokens.size(); ++i) {
        batch.token[i]     = tokens[i];
        batch.pos[i]       = past + (llama_pos) i;
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i]    = i + 1 == tokens.size();
    }
    batch.n_tokens     = (int32_t) tokens.size();
    const int32_t code = llama_decode(ctx, batch);
    llama_batch_free(batch);
    if (code != 0) {
        throw std::runtime_error("[elastic_measure_layers] llama_decode returned " + std::to_string(code));
    }
}

// what a query pays the cell that it is to look up, beyond the mean of the others; not the first cell: without a BOS, heads
// that find nothing rest on it
double looked_up(const float * before, const float * after, int32_t first, int32_t wanted) {
    double others = 0.0;
    for (int32_t j = 1; j < N_TOKENS; ++j) {
        others += j == wanted ? 0.0 : after[first + j] - before[first + j];
    }
    return after[first + wanted] - before[first + wanted] - others / (N_TOKENS - 2);
}

}  // namespace

std::vector<float> measure_layers(llama_model * model, int32_t n_threads) {
    const llama_vocab *            vocab  = llama_model_get_vocab(model);
    const std::vector<llama_token> tokens = random_tokens(vocab);
    const context_ptr              ctx    = make_context(model, n_threads);

    elastic_params params = elastic_default_params();
    params.layers         = ELASTIC_LAYERS_EVEN;
    params.release_memory = false;
    params.n_checkpoints  = 0;
    elastic_cache & cache = attach(*ctx, params);
    cache.set_prefill(true);  // a prompt is not compressed

    std::vector<llama_token> prompt;
    if (llama_vocab_get_add_bos(vocab)) {
        prompt.push_back(llama_vocab_bos(vocab));
    }
    const auto first = (int32_t) prompt.size();
    prompt.insert(prompt.end(), tokens.begin(), tokens.end());
    prompt.insert(prompt.end(), tokens.begin(), tokens.begin() + N_BEFORE);
    decode(ctx.get(), prompt, 0);

    const auto &        shape  = cache.parts().kv.shape;
    head_map            before = importance_of(cache.parts(), 0).sum;
    std::vector<double> total(shape.n_layer, 0.0);
    for (int32_t i = N_BEFORE; i < N_BEFORE + N_QUERIES; ++i) {
        decode(ctx.get(), { tokens[i] }, (llama_pos) prompt.size() + i - N_BEFORE);
        head_map after = importance_of(cache.parts(), 0).sum;
        for (int32_t il = 0; il < shape.n_layer; ++il) {
            for (int32_t ih = 0; ih < shape.n_head_kv; ++ih) {
                total[il] += looked_up(before.row(il, ih), after.row(il, ih), first, i + 1) / shape.n_head_kv;
            }
        }
        before = std::move(after);
    }
    std::vector<float> res;
    for (const double x : total) {
        res.push_back((float) std::max(0.0, x / N_QUERIES));
    }
    return res;
}

std::vector<float> layer_shares(const std::vector<float> & scores) {
    const float        most = scores.empty() ? 0.0f : *std::max_element(scores.begin(), scores.end());
    std::vector<float> res;
    for (const float x : scores) {
        if (!(x >= 0.0f) || std::isinf(x)) {
            throw error("[layer_shares] scores: got " + std::to_string(x) + ", expected finite values >= 0");
        }
        res.push_back(1.0f + EXTRA * std::sqrt(x < MIN_SCORE ? 0.0f : x / most));
    }
    if (most < MIN_SCORE) {
        return {};
    }
    const float mean = std::accumulate(res.begin(), res.end(), 0.0f) / (float) res.size();
    for (float & x : res) {
        x /= mean;
    }
    return *std::max_element(res.begin(), res.end()) > *std::min_element(res.begin(), res.end()) ? res : std::vector<float>();
}

}  // namespace elastic
