#include "runtime/watched_memory.h"

#include "runtime/elastic_cache.h"
#include "runtime/lazy_buffers.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-kv-cache.h"
#include "llama-memory-recurrent.h"

#include <limits>

namespace elastic {

watched_memory::watched_memory(llama_memory_i * inner) : memory(inner) {}

watched_memory::~watched_memory() = default;

watched_memory * watched_memory::of(const llama_context & ctx) {
    return static_cast<watched_memory *>(ctx.get_memory());
}

void watched_memory::set_cache(std::unique_ptr<elastic_cache> value) {
    attached = std::move(value);
}

//
// decode
//

// decode comes here once pending shifts and copies are done, and before slots are searched
llama_memory_context_ptr watched_memory::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) {
    if (attached && !retries) {
        attached->on_batch(balloc.get_batch());
    }
    retries = false;
    return memory->init_batch(balloc, n_ubatch, embd_all);
}

// with optimize: decode found no slots for a batch, and tries once more if this changes anything
llama_memory_context_ptr watched_memory::init_update(llama_context * lctx, bool optimize) {
    retries = optimize;
    return memory->init_update(lctx, optimize);
}

//
// changes
//

bool watched_memory::get_can_shift() const {
    return memory->get_can_shift() && !(attached && attached->parts().active);
}

static bool releases(const elastic_cache & cache) {
    return cache.parts().memory.is_enabled();
}

void watched_memory::clear(bool data) {
    if (!attached) {
        memory->clear(data);
        return;
    }
    attached->on_clear();
    const lazy_buffers lazy(releases(*attached));
    memory->clear(data);
}

// as llama.cpp's caches read a range
static std::pair<llama_pos, llama_pos> range(llama_pos p0, llama_pos p1) {
    return { std::max(p0, 0), p1 < 0 ? std::numeric_limits<llama_pos>::max() : p1 };
}

// part by part, in llama.cpp's order: a recurrent state may refuse, too, and nothing has changed then
bool watched_memory::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    if (!attached) {
        return memory->seq_rm(seq_id, p0, p1);
    }
    const auto [begin, end] = range(p0, p1);
    const auto & parts      = attached->parts().kv.parts;
    if (!attached->can_seq_rm(seq_id, begin, end) || (parts.recurrent && !parts.recurrent->seq_rm(seq_id, p0, p1))) {
        return false;
    }
    attached->on_seq_rm(seq_id, begin, end);
    bool res = parts.attention->seq_rm(seq_id, p0, p1);
    if (parts.window) {
        res &= parts.window->seq_rm(seq_id, p0, p1);
    }
    return res;
}

void watched_memory::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    memory->seq_cp(seq_id_src, seq_id_dst, p0, p1);  // which checks the arguments
    if (attached) {
        attached->on_seq_cp(seq_id_src, seq_id_dst);
    }
}

void watched_memory::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    memory->seq_add(seq_id, p0, p1, shift);
    const auto [begin, end] = range(p0, p1);
    if (attached && shift != 0 && begin != end) {
        attached->on_seq_add(seq_id, begin, end, shift);
    }
}

//
// states
//

// A partial state is one of windows or recurrent parts alone; of a plain memory it is all there is. llama.cpp carries out copies between
// streams at the next decode; before that it would save rows that are not there yet, and write over what was loaded.
void watched_memory::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    if (attached) {
        attached->parts().kv.settle();
    }
    memory->state_write(io, seq_id, flags);
    if (attached && !(flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY)) {
        attached->state_write(io, seq_id);
    }
}

void watched_memory::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    if (!attached) {
        memory->state_read(io, seq_id, flags);
        return;
    }
    attached->parts().kv.settle();
    try {
        const lazy_buffers lazy(releases(*attached));
        memory->state_read(io, seq_id, flags);
    } catch (...) {
        attached->on_load_failed();
        throw;
    }
    const auto & parts = attached->parts().kv.parts;
    if (flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) {
        if (!parts.window && !parts.recurrent) {
            attached->forget(seq_id);
        }
        return;
    }
    try {
        attached->state_read(io, seq_id);
    } catch (...) {  // as llama.cpp: cells that nothing is known of do not stay
        seq_id < 0 ? clear(true) : (void) seq_rm(seq_id, -1, -1);
        throw;
    }
}

}  // namespace elastic

llama_memory_i * llama_elastic_watch(llama_memory_i * memory) {
    return memory ? new elastic::watched_memory(memory) : nullptr;
}

llama_memory_i * llama_elastic_watched(llama_memory_i * memory) {
    return memory ? static_cast<elastic::watched_memory *>(memory)->inner() : nullptr;
}
