// Answers a prompt with the elastic KV cache and prints how many cells it takes before and after.
//
//   answer MODEL.gguf PROMPT [N_TOKENS] [BUDGET]

#include "elastic.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int fail(const char * what, const char * why) {
    fprintf(stderr, "error: %s: %s\n", what, why);
    return 1;
}

static void print_cells(const struct llama_context * ctx, const char * when, int n_tokens) {
    printf("%s: %d tokens in %d cells\n", when, n_tokens, elastic_n_cells(ctx, 0));
}

// llama.cpp tells much about a model; this shows only what went wrong
static void log_errors(enum ggml_log_level level, const char * text, void * user_data) {
    (void) user_data;
    if (level == GGML_LOG_LEVEL_ERROR) {
        fputs(text, stderr);
    }
}

int main(int argc, char ** argv) {
    if (argc < 3) {
        return fail("usage", "answer MODEL.gguf PROMPT [N_TOKENS] [BUDGET]");
    }
    const char * prompt  = argv[2];
    const int    n_new   = argc > 3 ? atoi(argv[3]) : 32;
    const double budget  = argc > 4 ? atof(argv[4]) : 0.2;
    const int    n_bytes = (int) strlen(prompt);

    llama_log_set(log_errors, NULL);
    llama_backend_init();
    struct llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (model == NULL) {
        return fail("model", argv[1]);
    }
    const struct llama_vocab * vocab = llama_model_get_vocab(model);

    llama_token * tokens   = malloc((n_bytes + 3) * sizeof(llama_token));  // a token has a byte at least; BOS, a space before, EOS
    const int     n_prompt = llama_tokenize(vocab, prompt, n_bytes, tokens, n_bytes + 3, true, true);
    if (n_prompt <= 0) {
        return fail("prompt", "no tokens");
    }

    struct llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx                       = n_prompt + n_new;
    cparams.n_batch                     = n_prompt;  // the prompt comes as one batch
    struct llama_context * ctx          = llama_init_from_model(model, cparams);
    if (ctx == NULL) {
        return fail("context", "see above");
    }

    // all that is to be done: the stages are recognised inside llama_decode
    struct elastic_params eparams = elastic_default_params();
    eparams.budget                = budget;
    if (elastic_attach(ctx, &eparams) != 0) {
        return fail("elastic_attach", elastic_last_error());
    }

    if (llama_decode(ctx, llama_batch_get_one(tokens, n_prompt)) != 0) {
        return fail("llama_decode", "the prompt");
    }
    print_cells(ctx, "prompt", n_prompt);

    // would happen by itself when the first token of the answer is decoded
    if (elastic_compress(ctx, 0) < 0) {
        return fail("elastic_compress", elastic_last_error());
    }
    print_cells(ctx, "compressed", n_prompt);

    struct llama_sampler * greedy = llama_sampler_init_greedy();
    printf("answer: ");
    int n_said = 0;
    for (; n_said < n_new; n_said++) {
        llama_token token = llama_sampler_sample(greedy, ctx, -1);
        if (llama_vocab_is_eog(vocab, token)) {
            break;
        }
        char      piece[256];
        const int n = llama_token_to_piece(vocab, token, piece, sizeof(piece), 0, false);
        fwrite(piece, 1, n > 0 ? n : 0, stdout);
        fflush(stdout);
        if (llama_decode(ctx, llama_batch_get_one(&token, 1)) != 0) {
            return fail("llama_decode", "the answer");
        }
    }
    printf("\n");
    print_cells(ctx, "end", n_prompt + n_said);

    llama_sampler_free(greedy);
    llama_free(ctx);
    llama_model_free(model);
    llama_backend_free();
    free(tokens);
    return 0;
}
