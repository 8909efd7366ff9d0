// Plain data that crosses from the bindings to the kernels: no torch, no containers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ktcore {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };
enum class Activation : int { silu = 0, gelu_tanh = 1, swiglu_oai = 2 };
enum class Scoring : int { softmax = 0, sigmoid = 1 };
// How packed weights are laid out: see packed.h.
enum class WeightFormat : int {
  bf16 = 0,
  int8 = 1,
  int4_g32 = 2,
  nibbles = 3,
  nibbles_g16 = 4,
  bytes = 5,
  bytes_g16 = 6
};

static constexpr int kWeightFormats = 7;
static constexpr int64_t kGroup = 32;  // weights and activations share one scale per group of this

static constexpr int64_t dtype_size(DType t) { return t == DType::f32 ? 4 : 2; }

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

}  // namespace ktcore
