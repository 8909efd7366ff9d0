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

// 16-bit integers with one scale per group of 32. Eight bits would halve the dot products of large
// batches, but leave 0.5 % of error in the first matrix and 1.2 % in the whole of `moe`; sixteen
// leave 0.003 %, and multiply bytes and nibbles without their ever needing a bias.
//
// The weights come as bytes or nibbles, four columns to a 32-bit lane; shifts widen bytes 0 and 2 of
// the lane together, then 1 and 3. So the pairs of a group of four columns are (0, 2) and (1, 3).
//
// Tile: pair[K/2][R] of int16[2]; scale[K/32][R] f32; sum[K/16][R] i32, of 16 columns' integers each,
// which undo the weights' bias and which their offsets multiply.
template <class S>
struct Int16Codec {
  using F = typename S::F;
  static constexpr int kVectors = Rows32<S>::kVectors;

  static constexpr int64_t row_bytes(int64_t cols) {
    return ceil_div(cols, kGroup) * (2 * kGroup + 12);
  }
  static const float* scales(const uint8_t* tile, int64_t rows, int64_t groups) {
    return reinterpret_cast<const float*>(tile + rows * groups * kGroup * 2);
  }
  static const int32_t* sums(const uint8_t* tile, int64_t rows, int64_t groups) {
    return reinterpret_cast<const int32_t*>(scales(tile, rows, groups) + rows * groups);
  }

  static KT_INLINE void encode(const F* v, int, uint8_t* tile, int64_t rows, int64_t row,
                               int64_t group, int64_t groups) {
    const float amax = S::absmax32(v);
    // Below this the reciprocal overflows: such a group is zero for every practical purpose.
    const bool tiny = amax < 1e-30f;
    // An infinite or NaN value makes the whole token NaN, as the exact sum of products would be.
    const bool finite = amax <= 3.4028235e38f;
    constexpr float kLargest = 32767.0f;
    alignas(64) int16_t q[kGroup];
    int32_t sum[2];
    S::encode16(v, S::set1(finite && !tiny ? kLargest / amax : 0.0f), q, sum);
    for (int64_t i = 0; i < kGroup / 2; ++i) {
      std::memcpy(tile + ((group * (kGroup / 2) + i) * rows + row) * 4, q + 2 * i, 4);
    }
    const float scale = !finite ? std::numeric_limits<float>::quiet_NaN()
                        : tiny  ? 0.0f
                                : amax / kLargest;
    const_cast<float*>(scales(tile, rows, groups))[group * rows + row] = scale;
    auto* sums_at = const_cast<int32_t*>(sums(tile, rows, groups)) + 2 * group * rows + row;
    sums_at[0] = finite ? sum[0] : 0;
    sums_at[rows] = finite ? sum[1] : 0;
  }

  static KT_INLINE void gather(const uint8_t* token, int, uint8_t* tile, int64_t rows, int64_t row,
                               int64_t groups) {
    copy_rows<4>(token, 1, tile, rows, row, groups * (kGroup / 2 + 3));
  }
};

// Pairs of floats, for fused multiply-adds: exact. Tile: pair[K/2][R] of float[2].
template <class S>
struct FloatCodec {
  using F = typename S::F;
  static constexpr int kVectors = Rows32<S>::kVectors;
  static constexpr int64_t kPairBytes = 8;

  static constexpr int64_t row_bytes(int64_t cols) {
    return ceil_div(cols, kGroup) * kGroup / 2 * kPairBytes;
  }

  static KT_INLINE void encode(const F* v, int, uint8_t* tile, int64_t rows, int64_t row,
                               int64_t group, int64_t) {
    alignas(64) float values[kGroup];
    for (int i = 0; i < kVectors; ++i) S::store(values + i * S::kLanes, v[i]);
    for (int64_t i = 0; i < kGroup / 2; ++i) {
      std::memcpy(tile + ((group * (kGroup / 2) + i) * rows + row) * kPairBytes, values + 2 * i,
                  kPairBytes);
    }
  }

  static KT_INLINE void gather(const uint8_t* token, int, uint8_t* tile, int64_t rows, int64_t row,
                               int64_t groups) {
    copy_rows<kPairBytes>(token, 1, tile, rows, row, groups * (kGroup / 2));
  }
};

// Pairs of bf16, for dot-product instructions. A token takes one row per plane: the first is the
// value rounded to bf16 (0.2 % of a Gaussian row), the next what that left over. Tile: pair[K/2][R].
template <class S>
struct Bf16Codec {
  using F = typename S::F;
  static constexpr int kVectors = Rows32<S>::kVectors;
  static constexpr int64_t kPairBytes = 4;

  static constexpr int64_t row_bytes(int64_t cols) {
    return ceil_div(cols, kGroup) * kGroup / 2 * kPairBytes;
  }

  static KT_INLINE void encode(const F* values, int planes, uint8_t* tile, int64_t rows,
                               int64_t row, int64_t group, int64_t) {
    constexpr int64_t kPairs = kGroup / 2;
    alignas(64) uint16_t bf16[kGroup];
    F v[kVectors];
    for (int i = 0; i < kVectors; ++i) v[i] = values[i];
    for (int plane = 0; plane < planes; ++plane, ++row) {
      for (int i = 0; i < kVectors; ++i) S::store_bf16(bf16 + i * S::kLanes, v[i]);
      if (plane + 1 < planes) {
        for (int i = 0; i < kVectors; ++i) v[i] = S::sub(v[i], S::load_bf16(bf16 + i * S::kLanes));
      }
      for (int64_t i = 0; i < kPairs; ++i) {
        std::memcpy(tile + ((group * kPairs + i) * rows + row) * kPairBytes, bf16 + 2 * i,
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
