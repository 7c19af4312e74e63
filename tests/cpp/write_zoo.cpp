// Writes tiny random models: those of llama.cpp's tests/test-llama-archs.cpp, and by the same recipe architectures that it leaves out.
//
//   write_zoo DIR         every model that the recipe knows
//   write_zoo DIR ARCH    one that it leaves out: with more metadata, and saved as it was made

#define main upstream_main
#include UPSTREAM_RECIPE
#undef main

#include "../src/llama-model.h"

#include <map>
#include <set>

namespace {

// what the recipe lacks for an architecture, or has in a form that it does not read
void complete(llm_arch arch, gguf_context * meta, bool is_variant) {
    llama_model_saver ms(arch, meta);
    switch (arch) {
        case LLM_ARCH_GEMMA4:
            ms.add_kv(LLM_KV_ATTENTION_SLIDING_WINDOW_PATTERN, std::vector<uint32_t>({ 1, 1, 0, 1, 0 }));
            ms.add_kv(LLM_KV_ATTENTION_SHARED_KV_LAYERS, uint32_t(is_variant ? 2 : 0));
            ms.add_kv(LLM_KV_ATTENTION_KEY_LENGTH, uint32_t(64));
            ms.add_kv(LLM_KV_ATTENTION_VALUE_LENGTH, uint32_t(64));
            ms.add_kv(LLM_KV_ROPE_DIMENSION_COUNT, uint32_t(64));
            ms.add_kv(LLM_KV_ROPE_DIMENSION_COUNT_SWA, uint32_t(64));
            break;
        case LLM_ARCH_LFM2:  // as published: without a window
            gguf_remove_key(meta, LLM_KV(arch)(LLM_KV_ATTENTION_SLIDING_WINDOW).c_str());
            break;
        case LLM_ARCH_GRANITE_SWITCH:
            ms.add_kv(LLM_KV_ADAPTER_COUNT, uint32_t(1));
            ms.add_kv(LLM_KV_ADAPTER_LORA_RANK, uint32_t(4));
            ms.add_kv(LLM_KV_ADAPTER_TOKEN_IDS_ACTIVATE, std::vector<uint32_t>({ 5 }));
            ms.add_kv(LLM_KV_ADAPTER_TOKEN_IDS_SUBSTITUTE, std::vector<uint32_t>({ 6 }));
            break;
        case LLM_ARCH_RWKV6QWEN2:
            ms.add_kv(LLM_KV_TOKEN_SHIFT_COUNT, uint32_t(1));
            break;
        case LLM_ARCH_RWKV7:
        case LLM_ARCH_ARWKV7:
            ms.add_kv(LLM_KV_TOKEN_SHIFT_COUNT, uint32_t(arch == LLM_ARCH_ARWKV7 ? 1 : 2));
            for (const llm_kv key : { LLM_KV_ATTENTION_DECAY_LORA_RANK, LLM_KV_ATTENTION_ICLR_LORA_RANK,
                                      LLM_KV_ATTENTION_VALUE_RESIDUAL_MIX_LORA_RANK, LLM_KV_ATTENTION_GATE_LORA_RANK }) {
                ms.add_kv(key, uint32_t(32));
            }
            break;
        case LLM_ARCH_BERT:
        case LLM_ARCH_NOMIC_BERT:
        case LLM_ARCH_NOMIC_BERT_MOE:
        case LLM_ARCH_JINA_BERT_V2:
        case LLM_ARCH_JINA_BERT_V3:
            ms.add_kv(LLM_KV_TOKENIZER_TOKEN_TYPE_COUNT, uint32_t(2));
            ms.add_kv(LLM_KV_ATTENTION_CAUSAL, false);
            ms.add_kv(LLM_KV_POOLING_TYPE, uint32_t(LLAMA_POOLING_TYPE_MEAN));
            break;
        case LLM_ARCH_MODERN_BERT:
        case LLM_ARCH_NEO_BERT:
        case LLM_ARCH_EUROBERT:
            ms.add_kv(LLM_KV_ATTENTION_CAUSAL, false);
            ms.add_kv(LLM_KV_POOLING_TYPE, uint32_t(LLAMA_POOLING_TYPE_MEAN));
            break;
        default:
            break;
    }
}

// metadata as the model was made of it, and its tensors: llama.cpp's own saver does not know every key
void save(const llama_model & model, const gguf_context * meta, const std::string & path) {
    gguf_context_ptr out(gguf_init_empty());
    gguf_set_kv(out.get(), meta);
    std::set<std::string> done;
    for (const auto & [name, tensor] : llama_internal_get_tensor_map(&model)) {
        // it is what tells RWKV-6 from its Qwen kind, and not required
        const bool drop = model.arch == LLM_ARCH_RWKV6QWEN2 && name.find("time_mix_first") != std::string::npos;
        if (!drop && done.insert(name).second) {
            gguf_add_tensor(out.get(), tensor);
        }
    }
    if (!gguf_write_to_file(out.get(), path.c_str(), /*only_meta*/ false)) {
        throw std::runtime_error("cannot write " + path);
    }
}

void write_one(const std::string & name, const std::string & dir) {
    static const std::map<std::string, std::string> variants = {
        { "gemma4-shared", "gemma4" },
        { "lfm2-full", "lfm2" },
    };
    const auto     variant = variants.find(name);
    const bool     varies  = variant != variants.end();
    const llm_arch arch    = llm_arch_from_string(varies ? variant->second : name);
    if (arch == LLM_ARCH_UNKNOWN) {
        throw std::runtime_error("no architecture " + name);
    }
    const bool       moe  = moe_mandatory(arch) || arch == LLM_ARCH_DEEPSEEK2OCR;
    gguf_context_ptr meta = get_gguf_ctx(arch, moe);
    complete(arch, meta.get(), varies);

    llama_model_params params = llama_model_default_params();
    params.progress_callback  = silent_model_load_progress;
    tensor_data_params random = { 42, 0.1f };
    llama_model_ptr    model(llama_model_init_from_user(meta.get(), set_tensor_data, &random, params));
    if (!model) {
        throw std::runtime_error("llama.cpp cannot make a model of " + name);
    }
    save(*model, meta.get(), dir + "/" + name + (moe ? "-moe.gguf" : "-dense.gguf"));
}

}  // namespace

int main(int argc, char ** argv) {
    if (argc != 2 && argc != 3) {
        fprintf(stderr, "usage: write_zoo DIR [ARCH]\n");
        return 2;
    }
    common_init();
    try {
        if (argc == 2) {
            return save_models("", 42, 0.1f, LOG_LEVEL_ERROR, argv[1]);
        }
        write_one(argv[2], argv[1]);
    } catch (const std::exception & e) {
        fprintf(stderr, "error: %s\n", e.what());
        return 1;
    }
    return 0;
}
