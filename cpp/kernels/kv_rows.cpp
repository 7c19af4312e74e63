#include "kernels/kv_rows.h"

#include "kernels/simd.h"

#include <cstring>

namespace elastic {

bool rows_supported(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32:
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16:
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q5_1:
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_IQ4_NL:
            return true;
        default:
            return false;
    }
}

size_t head_bytes(const kv_rows & t) {
    return ggml_row_size(t.type, t.n_embd_head);
}

// The bits of ggml's own, which ggml-base compiles for any processor. Measured in turns with those, AVX-512, one thread: attention
// of one query takes 1.27 times as long with ggml's q8_0 (a token of a 7B shape with 1260 cells 1.05 times) and 2.5 with its q4_0.

// of blocks of 32: a half that scales, then the numbers
static void q8_0_to_f32(const uint8_t * src, float * dst, int64_t n) {
    for (int64_t i = 0; i < n; i += 32, src += 34) {
        uint16_t scale;
        std::memcpy(&scale, src, sizeof(scale));
        const float    d = f16_to_f32(scale);
        const int8_t * x = (const int8_t *) src + 2;
        for (int64_t j = 0; j < 32; ++j) {
            dst[i + j] = (float) x[j] * d;
        }
    }
}

static void q4_0_to_f32(const uint8_t * src, float * dst, int64_t n) {
    for (int64_t i = 0; i < n; i += 32, src += 18) {
        uint16_t scale;
        std::memcpy(&scale, src, sizeof(scale));
        const float d = f16_to_f32(scale);
        for (int64_t j = 0; j < 16; ++j) {
            dst[i + j]      = (float) ((src[2 + j] & 0xf) - 8) * d;
            dst[i + j + 16] = (float) ((src[2 + j] >> 4) - 8) * d;
        }
    }
}

static void f16_to_f32(const uint16_t * src, float * dst, int64_t n) {
    int64_t i = 0;
    for (; i + N_SIMD <= n; i += N_SIMD) {
        store(dst + i, load(src + i));
    }
    for (; i < n; ++i) {
        dst[i] = f16_to_f32(src[i]);
    }
}

void to_f32(ggml_type type, const uint8_t * src, float * dst, int64_t n) {
    if (type == GGML_TYPE_F32) {
        std::memcpy(dst, src, n * sizeof(float));
    } else if (type == GGML_TYPE_F16) {
        f16_to_f32((const uint16_t *) src, dst, n);
    } else if (type == GGML_TYPE_Q8_0) {
        q8_0_to_f32(src, dst, n);
    } else if (type == GGML_TYPE_Q4_0) {
        q4_0_to_f32(src, dst, n);
    } else {
        ggml_get_type_traits(type)->to_float(src, dst, n);
    }
}

static void from_f32(ggml_type type, const float * src, uint8_t * dst, int64_t n) {
    if (type == GGML_TYPE_F32) {
        std::memcpy(dst, src, n * sizeof(float));
    } else if (type == GGML_TYPE_F16 || type == GGML_TYPE_BF16) {
        ggml_get_type_traits(type)->from_float_ref(src, dst, n);
    } else {
        ggml_quantize_chunk(type, src, dst, 0, 1, n, nullptr);
    }
}

// where head ih of a row begins
static uint8_t * head_ptr(const kv_rows & t, int64_t row, int32_t ih) {
    return t.data + row * t.row_bytes + ih * head_bytes(t);
}

// rows of one head lie far apart, each on another page
static constexpr size_t N_AHEAD = 16;

void prefetch(const uint8_t * data, size_t size) {
    for (size_t i = 0; i < size; i += 64) {
        __builtin_prefetch(data + i, 0, 2);
    }
}

void read_raw(const kv_rows & t, const std::vector<int32_t> & rows, int32_t ih, uint8_t * dst) {
    const size_t n = head_bytes(t);
    for (size_t i = 0; i < rows.size(); ++i) {
        std::memcpy(dst + i * n, head_ptr(t, rows[i], ih), n);
    }
}

void write_raw(const kv_rows & t, const std::vector<int32_t> & rows, int32_t ih, const uint8_t * src) {
    const size_t n = head_bytes(t);
    for (size_t i = 0; i < rows.size(); ++i) {
        std::memcpy(head_ptr(t, rows[i], ih), src + i * n, n);
    }
}

void copy_head(const kv_rows & t, int32_t row_src, int32_t row_dst, int32_t ih) {
    std::memmove(head_ptr(t, row_dst, ih), head_ptr(t, row_src, ih), head_bytes(t));
}

void read_f32(const kv_rows & t, const std::vector<int32_t> & rows, int32_t ih, float * dst) {
    for (size_t i = 0; i < rows.size(); ++i) {
        if (i + N_AHEAD < rows.size()) {
            prefetch(head_ptr(t, rows[i + N_AHEAD], ih), head_bytes(t));
        }
        to_f32(t.type, head_ptr(t, rows[i], ih), dst + i * t.n_embd_head, t.n_embd_head);
    }
}

void write_f32(const kv_rows & t, const std::vector<int32_t> & rows, int32_t ih, const float * src) {
    if (rows.empty()) {
        return;
    }
    std::vector<uint8_t> raw(rows.size() * head_bytes(t));
    from_f32(t.type, src, raw.data(), (int64_t) rows.size() * t.n_embd_head);
    write_raw(t, rows, ih, raw.data());
}

}  // namespace elastic
