// Activations as the dot products take them.
//
// An encoded tile holds R rows, interleaved so that the values that one step of the kernel
// broadcasts lie side by side. A token takes one row per plane: the first plane is the value rounded
// to the arithmetic's type, the next what that rounding left over. One plane is the fast default
// (int8: about 0.5 % of a Gaussian row, bf16: 0.2 %), two are nearly exact (int8: 0.004 %).
//
// An encoded token is the tile of that token alone.
#pragma once

namespace ktcore::KTCORE_ISA {

// int8 with one scale per group of 32. Tile: q[K/4][R][4] int8, scale[K/32][R] f32,
// offset[K/32][R] i32; offset = -zero_point * sum of the group, which undoes the weights' bias.
template <class S, int kZeroPoint>
struct Int8Codec {
  using F = typename S::F;
  static constexpr int kVectors = Rows32<S>::kVectors;

  static constexpr int64_t row_bytes(int64_t cols) {
    const int64_t groups = ceil_div(cols, kGroup);
    return groups * (kGroup + 8);
  }

  static KT_INLINE void encode(const F* values, int planes, uint8_t* tile, int64_t rows,
                               int64_t row, int64_t group, int64_t groups) {
    F v[kVectors];
    for (int i = 0; i < kVectors; ++i) v[i] = values[i];
    auto* scales = reinterpret_cast<float*>(tile + rows * groups * kGroup);
    auto* offsets = reinterpret_cast<int32_t*>(scales + rows * groups);
    for (int plane = 0; plane < planes; ++plane, ++row) {
      const float amax = S::absmax32(v);
      // Below this the reciprocal overflows: such a group is zero for every practical purpose.
      const bool tiny = amax < 1e-30f;
      const float scale = tiny ? 0.0f : amax / 127.0f;
      const float inverse = tiny ? 0.0f : 127.0f / amax;
      alignas(64) int8_t q[kGroup];
      F rounded[kVectors];
      const int32_t sum = S::quantize32(v, S::set1(inverse), q, rounded);
      for (int64_t i = 0; i < kGroup / 4; ++i) {
        std::memcpy(tile + ((group * (kGroup / 4) + i) * rows + row) * 4, q + 4 * i, 4);
      }
      // An infinite or NaN value makes the whole token NaN, as it would in exact arithmetic.
      const bool finite = amax <= 3.4028235e38f;
      scales[group * rows + row] = finite ? scale : std::numeric_limits<float>::quiet_NaN();
      offsets[group * rows + row] = finite ? -kZeroPoint * sum : 0;
      if (plane + 1 < planes) {
        for (int i = 0; i < kVectors; ++i) {
          v[i] = S::fma(rounded[i], S::set1(-scale), v[i]);
        }
      }
    }
  }

  // Copies an encoded token (of `planes` rows) to rows [row, row + planes) of a tile.
  static KT_INLINE void gather(const uint8_t* token, int planes, uint8_t* tile, int64_t rows,
                               int64_t row, int64_t groups) {
    // The three arrays are all of 4-byte items, row index fastest, in the same order.
    const int64_t items = groups * (kGroup / 4 + 2);
    copy_rows(token, planes, tile, rows, row, items);
  }

  static KT_INLINE void copy_rows(const uint8_t* token, int planes, uint8_t* tile, int64_t rows,
                                  int64_t row, int64_t items) {
    for (int64_t i = 0; i < items; ++i) {
      for (int p = 0; p < planes; ++p) {
        std::memcpy(tile + (i * rows + row + p) * 4, token + (i * planes + p) * 4, 4);
      }
    }
  }
};

// Pairs of bf16 (for dot-product instructions; four bytes) or of floats (for fused multiply-adds;
// eight bytes, exact with a single plane). Tile: pair[K/2][R].
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
    for (int64_t i = 0; i < groups * (kGroup / 2); ++i) {
      for (int p = 0; p < planes; ++p) {
        std::memcpy(tile + (i * rows + row + p) * kPairBytes, token + (i * planes + p) * kPairBytes,
                    kPairBytes);
      }
    }
  }
};

}  // namespace ktcore::KTCORE_ISA
