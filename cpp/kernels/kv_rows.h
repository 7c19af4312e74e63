#pragma once

// Reads and writes one head of some rows of K or V.

#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace elastic {

// K or V of one layer in one stream, as llama.cpp stores it with flash attention
struct kv_rows {
    ggml_type type        = GGML_TYPE_F16;
    uint8_t * data        = nullptr;
    int32_t   n_head_kv   = 0;
    int32_t   n_embd_head = 0;  // elements of one head of one row
    int64_t   n_rows      = 0;  // cells in the stream that may be used
    int64_t   row_bytes   = 0;  // from one cell to the next
};

// f32, f16, bf16, q8_0, q5_0, q5_1, q4_0, q4_1, iq4_nl
bool rows_supported(ggml_type type);

size_t head_bytes(const kv_rows & t);

// into the second cache
void prefetch(const uint8_t * data, size_t size);

// n numbers that lie side by side, whole blocks of them
void to_f32(ggml_type type, const uint8_t * src, float * dst, int64_t n);

// bytes as stored, [n][head_bytes]
void read_raw(const kv_rows & t, const std::vector<int32_t> & rows, int32_t ih, uint8_t * dst);
void write_raw(const kv_rows & t, const std::vector<int32_t> & rows, int32_t ih, const uint8_t * src);

// one head of a row to another row, bit by bit
void copy_head(const kv_rows & t, int32_t row_src, int32_t row_dst, int32_t ih);

// as f32, [n][n_embd_head]
void read_f32(const kv_rows & t, const std::vector<int32_t> & rows, int32_t ih, float * dst);
void write_f32(const kv_rows & t, const std::vector<int32_t> & rows, int32_t ih, const float * src);

}  // namespace elastic
