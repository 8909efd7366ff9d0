// The dot products of one block (32 weight rows) with a tile of R activation rows, for
// each weight format. Every output is summed in the order of the columns in one lane, whatever R
// is, so a token's result does not depend on which tokens share its tile.
//
// Adding a format: a struct like these, and a line in table.inl.
#pragma once

namespace ktcore::KTCORE_ISA {

// How many of a block's vectors to compute at once: all of them while the sums fit in registers, so
// that memory is read in one pass and broadcasts are shared.
template <class S>
static constexpr int vectors_at_once(int rows, int cells) {
  int v = static_cast<int>(kBlockRows) / S::kLanes;
  while (v > 1 && v * rows > cells) v /= 2;
  return v;
}

template <class S>
struct Int4Group32 {
  using Codec = Int16Codec<S, 8>;
  static constexpr WeightFormat kFormat = WeightFormat::int4_g32;
  static constexpr int kMaxRows = S::kIntRows;
  static constexpr int kPlanes = 1, kExactPlanes = 1;

  template <int R>
  static void dot(const uint8_t* block, int64_t groups, const uint8_t* tile,
                  float* out, int64_t prefetch) {
    constexpr int V = vectors_at_once<S>(R, S::kIntCells);
    constexpr int64_t kGroupBytes = group_bytes(kFormat);
    constexpr int kUnits = static_cast<int>(kGroup) / 8;
    const auto* scales = reinterpret_cast<const float*>(tile + R * groups * kGroup * 2);
    const auto* offsets = reinterpret_cast<const int32_t*>(scales + R * groups);
    for (int v0 = 0; v0 < static_cast<int>(kBlockRows) / S::kLanes; v0 += V) {
      const uint8_t* w = block + v0 * S::kLanes * 4;
      typename S::F acc[V][R];
      KT_UNROLL
      for (int v = 0; v < V; ++v) {
        KT_UNROLL
        for (int r = 0; r < R; ++r) acc[v][r] = S::zero();
      }
      const uint8_t* a = tile;
      for (int64_t g = 0; g < groups; ++g, a += 2 * kGroup * R, w += kGroupBytes) {
        typename S::I high[V][R], low[V][R];
        KT_UNROLL
        for (int v = 0; v < V; ++v) {
          KT_UNROLL
          for (int r = 0; r < R; ++r) {
            high[v][r] = S::zero_i();
            low[v][r] = S::begin_u4(offsets[g * R + r]);
          }
        }
        KT_UNROLL
        for (int unit = 0; unit < kUnits; ++unit) {
          typename S::I nibbles[2][V];
          KT_UNROLL
          for (int v = 0; v < V; ++v) {
            const uint8_t* p = w + unit * kUnitBytes + v * S::kLanes * 4;
            if constexpr (R <= 2) S::prefetch(p + prefetch);
            const typename S::I raw = S::load_i(p);
            nibbles[0][v] = S::low_nibbles(raw);
            nibbles[1][v] = S::high_nibbles(raw);
          }
          KT_UNROLL
          for (int half = 0; half < 2; ++half) {
            KT_UNROLL
            for (int r = 0; r < R; ++r) {
              const uint8_t* x = a + ((unit * 2 + half) * R + r) * 8;
              const typename S::I x_high = S::broadcast4(x), x_low = S::broadcast4(x + 4);
              KT_UNROLL
              for (int v = 0; v < V; ++v) {
                high[v][r] = S::dot_u4(high[v][r], nibbles[half][v], x_high);
                low[v][r] = S::dot_u4(low[v][r], nibbles[half][v], x_low);
              }
            }
          }
        }
        KT_UNROLL
        for (int v = 0; v < V; ++v) {
          const uint8_t* p = block + g * kGroupBytes + kUnits * kUnitBytes;
          const typename S::F scale =
              S::load_bf16(reinterpret_cast<const uint16_t*>(p) + (v0 + v) * S::kLanes);
          KT_UNROLL
          for (int r = 0; r < R; ++r) {
            const typename S::I sum = S::add_high(S::end_u4(low[v][r], offsets[g * R + r]),
                                                  S::end_u4(high[v][r], 0));
            const typename S::F both = S::mul(scale, S::set1(scales[g * R + r]));
            acc[v][r] = S::fma(S::to_f32(sum), both, acc[v][r]);
          }
        }
      }
      KT_UNROLL
      for (int v = 0; v < V; ++v) {
        KT_UNROLL
        for (int r = 0; r < R; ++r) S::store(out + r * kBlockRows + (v0 + v) * S::kLanes, acc[v][r]);
      }
    }
  }
};

template <class S>
struct Int8Channel {
  using Codec = Int16Codec<S, S::kSignedWeights ? 0 : 128>;
  static constexpr WeightFormat kFormat = WeightFormat::int8;
  static constexpr int kMaxRows = S::kIntRows;
  static constexpr int kPlanes = 1, kExactPlanes = 1;

  template <int R>
  static void dot(const uint8_t* block, int64_t groups, const uint8_t* tile,
                  float* out, int64_t prefetch) {
    constexpr int V = vectors_at_once<S>(R, S::kIntCells);
    constexpr int64_t kGroupBytes = group_bytes(kFormat);
    const auto* scales = reinterpret_cast<const float*>(tile + R * groups * kGroup * 2);
    const auto* offsets = reinterpret_cast<const int32_t*>(scales + R * groups);
    for (int v0 = 0; v0 < static_cast<int>(kBlockRows) / S::kLanes; v0 += V) {
      const uint8_t* w = block + v0 * S::kLanes * 4;
      typename S::F acc[V][R];
      KT_UNROLL
      for (int v = 0; v < V; ++v) {
        KT_UNROLL
        for (int r = 0; r < R; ++r) acc[v][r] = S::zero();
      }
      const uint8_t* a = tile;
      for (int64_t g = 0; g < groups; ++g, a += 2 * kGroup * R, w += kGroupBytes) {
        typename S::I high[V][R], low[V][R];
        KT_UNROLL
        for (int v = 0; v < V; ++v) {
          KT_UNROLL
          for (int r = 0; r < R; ++r) {
            high[v][r] = S::zero_i();
            low[v][r] = S::set1_i32(offsets[g * R + r]);
          }
        }
        KT_UNROLL
        for (int unit = 0; unit < 8; ++unit) {
          typename S::W8 weight[V];
          KT_UNROLL
          for (int v = 0; v < V; ++v) {
            const uint8_t* p = w + unit * kUnitBytes + v * S::kLanes * 4;
            if constexpr (R <= 2) S::prefetch(p + prefetch);
            weight[v] = S::weight_u8(S::load_i(p));
          }
          KT_UNROLL
          for (int r = 0; r < R; ++r) {
            const uint8_t* x = a + (unit * R + r) * 8;
            const typename S::I x_high = S::broadcast4(x), x_low = S::broadcast4(x + 4);
            KT_UNROLL
            for (int v = 0; v < V; ++v) {
              high[v][r] = S::dot_u8(high[v][r], weight[v], x_high);
              low[v][r] = S::dot_u8(low[v][r], weight[v], x_low);
            }
          }
        }
        KT_UNROLL
        for (int r = 0; r < R; ++r) {
          const typename S::F scale = S::set1(scales[g * R + r]);
          KT_UNROLL
          for (int v = 0; v < V; ++v) {
            const typename S::I sum = S::add_high(low[v][r], high[v][r]);
            acc[v][r] = S::fma(S::to_f32(sum), scale, acc[v][r]);
          }
        }
      }
      KT_UNROLL
      for (int v = 0; v < V; ++v) {
        const auto* channel = reinterpret_cast<const float*>(block + groups * kGroupBytes);
        const typename S::F scale = S::load(channel + (v0 + v) * S::kLanes);
        KT_UNROLL
        for (int r = 0; r < R; ++r) {
          S::store(out + r * kBlockRows + (v0 + v) * S::kLanes, S::mul(acc[v][r], scale));
        }
      }
    }
  }
};

template <class S>
struct Bf16 {
  using Codec = Bf16Codec<S>;
  static constexpr WeightFormat kFormat = WeightFormat::bf16;
  static constexpr int kMaxRows = S::kFloatRows;
  static constexpr int kPlanes = 1, kExactPlanes = S::kBf16Dot ? 2 : 1;

  template <int R>
  static void dot(const uint8_t* block, int64_t groups, const uint8_t* tile,
                  float* out, int64_t prefetch) {
    constexpr int V = vectors_at_once<S>(R, S::kFloatCells);
    for (int v0 = 0; v0 < static_cast<int>(kBlockRows) / S::kLanes; v0 += V) {
      const uint8_t* w = block + v0 * S::kLanes * 4;
      typename S::F acc[V][R];
      KT_UNROLL
      for (int v = 0; v < V; ++v) {
        KT_UNROLL
        for (int r = 0; r < R; ++r) acc[v][r] = S::zero();
      }
      const uint8_t* a = tile;
      for (int64_t pair = 0; pair < groups * (kGroup / 2); ++pair) {
        typename S::Wb weight[V];
        KT_UNROLL
        for (int v = 0; v < V; ++v) {
          const uint8_t* p = w + v * S::kLanes * 4;
          if constexpr (R <= 2) S::prefetch(p + prefetch);
          weight[v] = S::weight_bf16(S::load_i(p));
        }
        KT_UNROLL
        for (int r = 0; r < R; ++r) {
          const typename S::Ab x = S::activation_bf16(a + r * Codec::kPairBytes);
          KT_UNROLL
          for (int v = 0; v < V; ++v) acc[v][r] = S::dot_bf16(acc[v][r], weight[v], x);
        }
        a += R * Codec::kPairBytes;
        w += kUnitBytes;
      }
      KT_UNROLL
      for (int v = 0; v < V; ++v) {
        KT_UNROLL
        for (int r = 0; r < R; ++r) S::store(out + r * kBlockRows + (v0 + v) * S::kLanes, acc[v][r]);
      }
    }
  }
};

// Calls dot<R> for a run-time R.
template <class Format, int R = Format::kMaxRows>
static KT_INLINE void dot_block(int rows, const uint8_t* block, int64_t groups,
                                const uint8_t* tile, float* out, int64_t prefetch) {
  if (rows == R) return Format::template dot<R>(block, groups, tile, out, prefetch);
  if constexpr (R > 1) {
    return dot_block<Format, R - 1>(rows, block, groups, tile, out, prefetch);
  }
}

}  // namespace ktcore::KTCORE_ISA
