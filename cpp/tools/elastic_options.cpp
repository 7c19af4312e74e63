#include "elastic_options.h"

#include "arg.h"
#include "common.h"
#include "elastic_media.h"
#include "log.h"
#include "runtime/elastic.h"

#include <stdexcept>

static struct {
    // naming any of the first three switches the elastic cache on
    double         budget = -1.0;  // < 0: not given
    std::string    policy;
    int32_t        max_cells        = 0;
    int32_t        n_checkpoints    = -1;  // -1: 2, or 4 with image_checkpoint
    bool           image_checkpoint = false;
    elastic_layers layers           = ELASTIC_LAYERS_AUTO;

    bool is_on() const { return (budget >= 0.0 && budget != 1.0) || max_cells > 0 || (budget < 0.0 && !policy.empty()); }
} options;

static double number(const char * name, const std::string & value) {
    size_t end = 0;
    double res = 0.0;
    try {
        res = std::stod(value, &end);
    } catch (const std::exception &) {
        end = 0;
    }
    if (end == 0 || end != value.size() || !(res > 0.0)) {
        throw std::invalid_argument(std::string(name) + ": got '" + value +
                                    "', expected a fraction of the cells (0 < B <= 1) or a number of cells (B > 1)");
    }
    return res;
}

static int32_t at_least(const char * name, int value, int low) {
    if (value < low) {
        throw std::invalid_argument(std::string(name) + ": got " + std::to_string(value) + ", expected >= " + std::to_string(low));
    }
    return value;
}

void elastic_add_options(const std::function<void(common_arg)> & add) {
    add(common_arg(
            { "--kv-budget" }, "B",
            "elastic KV cache: what is kept of each sequence, a fraction of its tokens (0 < B <= 1) or a number of cells (B > 1); 1 is "
            "off (default: 1, or 0.2 if another --kv option is given)",
            [](common_params &, const std::string & value) { options.budget = number("--kv-budget", value); })
            .set_env("LLAMA_ARG_KV_BUDGET"));
    add(common_arg({ "--kv-policy" }, "NAME", "elastic KV cache: how cells are chosen (default: elastic)",
                   [](common_params &, const std::string & value) { options.policy = value; })
            .set_env("LLAMA_ARG_KV_POLICY"));
    add(common_arg(
            { "--kv-cells" }, "N",
            "elastic KV cache: a sequence never holds more cells than N and one ubatch, not even while its prompt is read (default: 0, "
            "no such cap)",
            [](common_params &, int value) { options.max_cells = at_least("--kv-cells", value, 0); })
            .set_env("LLAMA_ARG_KV_CELLS"));
    add(common_arg({ "--kv-layers" }, "auto|even",
                   "elastic KV cache: cells of the layers, more where words are looked up, or the same in all (default: auto)",
                   [](common_params &, const std::string & value) {
                       if (value != "auto" && value != "even") {
                           throw std::invalid_argument("--kv-layers: got '" + value + "', expected auto or even");
                       }
                       options.layers = value == "even" ? ELASTIC_LAYERS_EVEN : ELASTIC_LAYERS_AUTO;
                   })
            .set_env("LLAMA_ARG_KV_LAYERS"));
    add(common_arg({ "--kv-checkpoints" }, "N",
                   "elastic KV cache: states of a sequence that are kept so that what came later can be taken back (default: 2, or 4 with "
                   "--kv-image-checkpoint)",
                   [](common_params &, int value) { options.n_checkpoints = at_least("--kv-checkpoints", value, 0); })
            .set_env("LLAMA_ARG_KV_CHECKPOINTS"));
    add(common_arg({ "--kv-image-checkpoint" }, { "--no-kv-image-checkpoint" },
                   "elastic KV cache, server: compress after the last image of a prompt, before its question is known, so that another "
                   "question about the image starts there (default: disabled)",
                   [](common_params &, bool value) { options.image_checkpoint = value; })
            .set_env("LLAMA_ARG_KV_IMAGE_CHECKPOINT"));
    elastic_add_media_options(add);
}

static bool speculates(const common_params & params) {
    for (const auto type : params.speculative.types) {
        if (type != COMMON_SPECULATIVE_TYPE_NONE) {
            return true;
        }
    }
    return params.speculative.has_dft();
}

static bool attach(llama_context * ctx) {
    elastic_params params = elastic_default_params();
    if (options.budget >= 0.0) {
        params.budget = options.budget;
    }
    if (!options.policy.empty()) {
        params.policy = options.policy.c_str();
    }
    params.max_cells  = options.max_cells;
    params.layers     = options.layers;
    params.n_question = options.image_checkpoint ? 16 : 0;  // a question and the chat template around it
    if (options.n_checkpoints >= 0) {
        params.n_checkpoints = options.n_checkpoints;
    } else if (options.image_checkpoint) {
        params.n_checkpoints = 4;
    }
    if (elastic_attach(ctx, &params) != 0) {
        LOG_ERR("%s\n", elastic_last_error());
        LOG_ERR("the elastic KV cache cannot be used; leave the --kv options out to go on without it\n");
        return false;
    }
    LOG_INF("elastic KV cache: policy %s, budget %g\n", params.policy, params.budget);
    return true;
}

llama_context * elastic_init_context(common_params & params, llama_model * model, llama_context_params cparams) {
    if (!options.is_on()) {
        return llama_init_from_model(model, cparams);
    }
    if (speculates(params)) {
        LOG_ERR(
            "speculative decoding: does not go with the elastic KV cache; leave out the draft model and --spec options, or --kv-budget\n");
        return nullptr;
    }
    if (cparams.flash_attn_type == LLAMA_FLASH_ATTN_TYPE_AUTO) {
        cparams.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;  // V in rows
    }
    elastic_lazy_buffers(true);
    llama_context * ctx = llama_init_from_model(model, cparams);
    elastic_lazy_buffers(false);
    if (ctx && !attach(ctx)) {
        llama_free(ctx);
        return nullptr;
    }
    params.n_ctx_checkpoints = 0;
    return ctx;
}

bool elastic_has_image_checkpoint() {
    return options.image_checkpoint;
}
