// What patch 0003 declares in llama_context.

#include "llama-context.h"
#include "llama-model.h"

#include <algorithm>

void llama_context::set_elastic(llama_elastic_i * value) {
    synchronize();

    cparams.elastic = value;

    // the graphs of a policy differ, and old ones may refer to it
    sched_need_reserve = true;
    for (auto & res : gf_res_prev) {
        if (res) {
            res->reset();
        }
    }
    gf_res_prev_active = nullptr;
}

void llama_context::set_logits(const float * data) {
    synchronize();

    output_reserve(1);
    output_swaps.clear();

    std::copy(data, data + model.vocab.n_tokens(), logits.data);

    output_ids[0] = 0;
    n_outputs     = 1;
}
