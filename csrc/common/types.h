// Plain data that crosses from the bindings to the kernels: no torch, no containers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/platform.h"

namespace ktcore {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };
// Of a packed matrix's scales; e8m0 (OCP) are powers of two, 2^(byte - 127).
enum class ScaleType : int { f32 = 0, f16 = 1, bf16 = 2, e8m0 = 3 };
enum class Activation : int { silu = 0, gelu_tanh = 1, swiglu_oai = 2 };
enum class Scoring : int { softmax = 0, sigmoid = 1 };
// The stored formats that `quantize` and `dequantize` know.
enum class StoredFormat : int { bf16 = 0, int8 = 1, int4_g32 = 2 };

// How packed weights are laid out: see packed.h. The order is that of kernels/table.inl.
enum class WeightFormat : int {
  bf16,
  f16,
  f32,
  f8,
  int8,
  codes2,
  codes2_g16,
  codes3,
  codes3_g16,
  codes4,
  codes4_g16,
  codes5,
  codes5_g16,
  codes6,
  codes6_g16,
  codes8,
  codes8_g16,
  table3,
  table3_g16,
  table4,
  table4_g16
};

// How four activations of 16 bits lie in two items of four bytes: their upper bytes and their lower ones; columns 0 and
// 2, and 1 and 3; or 0 and 1, and 2 and 3.
enum class ItemOrder { bytes, words, pairs };

static constexpr int kWeightFormats = 21;
static constexpr int64_t kGroup = 32;  // weights and activations share one scale per group of this

static constexpr int64_t dtype_size(DType t) { return t == DType::f32 ? 4 : 2; }
static constexpr int64_t scale_bytes(ScaleType t) {
  return t == ScaleType::f32 ? 4 : t == ScaleType::e8m0 ? 1 : 2;
}

// A row-major matrix whose rows may be strided; `stride` counts elements.
struct ConstRows {
  const void* data;
  int64_t stride;
  DType dtype;
};
struct Rows {
  void* data;
  int64_t stride;
  DType dtype;
};

// Heads of tokens: element (token, head, column) is data[token * stride + head * head_stride + column].
struct ConstHeads {
  const void* data;
  int64_t stride, head_stride;
  DType dtype;

  KT_INLINE ConstRows row(int64_t token, int64_t head) const {
    const int64_t at = (token * stride + head * head_stride) * dtype_size(dtype);
    return {static_cast<const uint8_t*>(data) + at, 0, dtype};
  }
};
struct Heads {
  void* data;
  int64_t stride, head_stride;
  DType dtype;

  KT_INLINE Rows row(int64_t token, int64_t head) const {
    const int64_t at = (token * stride + head * head_stride) * dtype_size(dtype);
    return {static_cast<uint8_t*>(data) + at, 0, dtype};
  }
};

// Positions in a page of keys and values.
static constexpr int64_t kPagePositions = 32;
// Attention sums over spans of so many positions, each on its own, and then over the spans: in the
// same way whether threads share the spans out or not.
static constexpr int64_t kSpanPositions = 512;
// At most this many rows of queries are computed together: a page is brought into a form of its own for them.
static constexpr int64_t kAttentionRows = 256;

}  // namespace ktcore
