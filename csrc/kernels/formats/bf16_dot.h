// bf16 and fp8 weights times bf16 activations (Bf16Codec), by dot products of bf16, where there are such.
#pragma once

namespace ktcore::KTCORE_ISA {

// Where bf16 weights for dot-product instructions come from: kPairs pairs of columns at a time from a unit.
// `pair<I>` is rows [row, row + kLanes) of one of them.

template <class S>
struct PairsFromBf16 {
  static constexpr int kPairs = 1;
  static constexpr bool kScaled = false;
  template <int I>
  static KT_INLINE typename S::I pair(const uint8_t* from, int64_t row) {
    return S::load_i(from + row * 4);
  }
};

template <class S>
struct PairsFromF8 {
  static constexpr int kPairs = 2;
  static constexpr bool kScaled = true;
  template <int I>
  static KT_INLINE typename S::I pair(const uint8_t* from, int64_t row) {
    return S::template e4m3_pair<I>(S::load_i(from + row * 4));
  }
};

// Dot products of bf16, always with the packed block: that is a panel itself, or costs 3.5 operations to widen
// for each vector, beside a tile's 12 dot products. Sums of scaled weights run over pieces, as in Floats.
template <class S, class From>
struct Bf16Pairs {
  using Fine = Bf16Pairs;
  using Codec = Bf16Codec<S>;
  static constexpr int kMaxRows = S::kFloatRows;
  static constexpr int kDirectTiles = std::numeric_limits<int>::max(), kDirectRows = 0;
  static constexpr bool kOverwrites = false;
  static constexpr int64_t kGroupBytes = kGroup / 2 / From::kPairs * kUnitBytes;

  template <int R>
  KT_NOINLINE static void dot(const WeightLayout& layout, const uint8_t* block, const Range& range,
                              const uint8_t* tile, float* out, const Prefetch& prefetch,
                              const Ahead<S>& ahead) {
    Ahead<S> coming = ahead;
    constexpr int V = vectors_at_once<S>(R, S::kFloatCells);
    const int64_t step = From::kScaled ? piece_groups(layout) : range.count;
    const int64_t last = range.first + range.count;
    Groups<S, 1> groups(layout, kGroupBytes, block);
    for (int v0 = 0; v0 < static_cast<int>(kBlockRows) / S::kLanes; v0 += V) {
      const uint8_t* x = tile + range.first * (kGroup / 2) * Codec::kPairBytes * R;
      for (int64_t first = range.first; first < last; first += step) {
        const int64_t count = last - first < step ? last - first : step;
        const uint8_t* w = block + first * kGroupBytes;
        typename S::F sum[V][R], factor[V];
        if constexpr (From::kScaled) {
          clear_sums<S>(sum);
          w = groups.template begin<V>(first, v0);
          KT_UNROLL
          for (int v = 0; v < V; ++v) factor[v] = groups.outer(0, v0 + v);
        } else {
          load_sums<S>(sum, out, v0);
        }
        for (int64_t g = 0; g < count; ++g) {
          // Where codes are widened this takes registers, and 3 % more time than it saves.
          if constexpr (!From::kScaled) {
            if (v0 == 0) coming.step();
          }
          for (int64_t at = 0; at < kGroupBytes; at += kUnitBytes, w += kUnitBytes) {
            add_pairs<V, R>(sum, w, v0, x, prefetch, AllPairs());
            x += From::kPairs * Codec::kPairBytes * R;
          }
        }
        if constexpr (From::kScaled) {
          add_piece<S, true>(sum, factor, out, v0);
        } else {
          store_sums<S>(sum, out, v0);
        }
      }
    }
  }

 private:
  using AllPairs = std::make_integer_sequence<int, From::kPairs>;

  template <int V, int R, int... I>
  static KT_INLINE void add_pairs(typename S::F (&sum)[V][R], const uint8_t* w, int v0,
                                  const uint8_t* x, Prefetch prefetch,
                                  std::integer_sequence<int, I...>) {
    KT_UNROLL
    for (int v = v0; v < v0 + V; ++v) ask_ahead<S>(w + v * S::kLanes * 4, prefetch);
    (add_pair<I, V, R>(sum, w, v0, x + I * Codec::kPairBytes * R), ...);
  }
  template <int I, int V, int R>
  static KT_INLINE void add_pair(typename S::F (&sum)[V][R], const uint8_t* w, int v0,
                                 const uint8_t* x) {
    typename S::I weight[V];
    KT_UNROLL
    for (int v = 0; v < V; ++v) weight[v] = From::template pair<I>(w, (v0 + v) * S::kLanes);
    KT_UNROLL
    for (int r = 0; r < R; ++r) {
      const typename S::I value = S::broadcast4(x + r * Codec::kPairBytes);
      KT_UNROLL
      for (int v = 0; v < V; ++v) sum[v][r] = S::dot_bf16(sum[v][r], weight[v], value);
    }
  }
};

}  // namespace ktcore::KTCORE_ISA
