// Activations as the dot products take them.
//
// An encoded tile holds R rows, interleaved so that the values that one step of the kernel
// broadcasts lie side by side. An encoded token is the tile of that token alone.
#pragma once

namespace ktcore::KTCORE_ISA {

// Copies rows of 4-byte (or Bytes-byte) items from a tile of `count` rows to rows [row, row + count)
// of a tile of `rows`.
template <int64_t Bytes>
static KT_INLINE void copy_rows(const uint8_t* from, int count, uint8_t* to, int64_t rows,
                                int64_t row, int64_t items) {
  for (int64_t i = 0; i < items; ++i) {
    for (int p = 0; p < count; ++p) {
      std::memcpy(to + (i * rows + row + p) * Bytes, from + (i * count + p) * Bytes, Bytes);
    }
  }
}

// 16-bit integers as two int8 planes, value = scale * (256 * high + low), with one scale per group
// of 32. One int8 plane would halve the work of large batches, but it leaves 0.8 % of error in the
// first matrix alone and 1.2 % in the whole of `moe`; two leave 0.004 %.
//
// Tile: q[K/4][R] of {high[4], low[4]}, scale[K/32][R] f32, offset[K/32][R] i32, where
// offset = -zero_point * the group's sum undoes the bias of the weights.
template <class S, int kZeroPoint>
struct Int16Codec {
  using F = typename S::F;
  static constexpr int kVectors = Rows32<S>::kVectors;

  static constexpr int64_t row_bytes(int64_t cols) {
    return ceil_div(cols, kGroup) * (2 * kGroup + 8);
  }

  static KT_INLINE void encode(const F* v, int, uint8_t* tile, int64_t rows, int64_t row,
                               int64_t group, int64_t groups) {
    const float amax = S::absmax32(v);
    // Below this the reciprocal overflows: such a group is zero for every practical purpose.
    const bool tiny = amax < 1e-30f;
    // An infinite or NaN value makes the whole token NaN, as the exact sum of products would be.
    const bool finite = amax <= 3.4028235e38f;
    constexpr float kLargest = 127.0f * 256.0f;
    alignas(64) int8_t high[kGroup], low[kGroup];
    const int32_t sum = S::encode16(v, S::set1(finite && !tiny ? kLargest / amax : 0.0f), high, low);
    for (int64_t i = 0; i < kGroup / 4; ++i) {
      uint8_t* to = tile + ((group * (kGroup / 4) + i) * rows + row) * 8;
      std::memcpy(to, high + 4 * i, 4);
      std::memcpy(to + 4, low + 4 * i, 4);
    }
    auto* scales = reinterpret_cast<float*>(tile + rows * groups * kGroup * 2);
    auto* offsets = reinterpret_cast<int32_t*>(scales + rows * groups);
    scales[group * rows + row] = !finite ? std::numeric_limits<float>::quiet_NaN()
                                 : tiny  ? 0.0f
                                         : amax / kLargest;
    offsets[group * rows + row] = finite ? -kZeroPoint * sum : 0;
  }

  static KT_INLINE void gather(const uint8_t* token, int, uint8_t* tile, int64_t rows, int64_t row,
                               int64_t groups) {
    const int64_t planes_bytes = groups * kGroup * 2;
    copy_rows<8>(token, 1, tile, rows, row, groups * (kGroup / 4));
    copy_rows<4>(token + planes_bytes, 1, tile + rows * planes_bytes, rows, row, 2 * groups);
  }
};

// Pairs of bf16 (for dot-product instructions; four bytes) or of floats (for fused multiply-adds;
// eight bytes, and exact). A token takes one row per plane: the first is the value rounded to bf16
// (0.2 % of a Gaussian row), the next what that left over. Tile: pair[K/2][R].
template <class S>
struct Bf16Codec {
  using F = typename S::F;
  static constexpr int kVectors = Rows32<S>::kVectors;
  static constexpr int64_t kPairBytes = S::kBf16Dot ? 4 : 8;

  static constexpr int64_t row_bytes(int64_t cols) {
    return ceil_div(cols, kGroup) * kGroup / 2 * kPairBytes;
  }

  static KT_INLINE void encode(const F* values, int planes, uint8_t* tile, int64_t rows,
                               int64_t row, int64_t group, int64_t) {
    constexpr int64_t kPairs = kGroup / 2;
    alignas(64) uint8_t bytes[kPairs * kPairBytes];
    F v[kVectors];
    for (int i = 0; i < kVectors; ++i) v[i] = values[i];
    for (int plane = 0; plane < planes; ++plane, ++row) {
      if constexpr (S::kBf16Dot) {
        auto* out = reinterpret_cast<uint16_t*>(bytes);
        for (int i = 0; i < kVectors; ++i) S::store_bf16(out + i * S::kLanes, v[i]);
        if (plane + 1 < planes) {
          for (int i = 0; i < kVectors; ++i) v[i] = S::sub(v[i], S::load_bf16(out + i * S::kLanes));
        }
      } else {
        auto* out = reinterpret_cast<float*>(bytes);
        for (int i = 0; i < kVectors; ++i) S::store(out + i * S::kLanes, v[i]);
      }
      for (int64_t i = 0; i < kPairs; ++i) {
        std::memcpy(tile + ((group * kPairs + i) * rows + row) * kPairBytes, bytes + i * kPairBytes,
                    kPairBytes);
      }
    }
  }

  static KT_INLINE void gather(const uint8_t* token, int planes, uint8_t* tile, int64_t rows,
                               int64_t row, int64_t groups) {
    copy_rows<kPairBytes>(token, planes, tile, rows, row, groups * (kGroup / 2));
  }
};

}  // namespace ktcore::KTCORE_ISA
