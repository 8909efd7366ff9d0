// bf16 weights times activations of 16 bits (Int16Codec), where there are no dot products of bf16.
#pragma once

namespace ktcore::KTCORE_ISA {

// Weights as integers of 16 bits, so many to the largest of a row, which are made as a block is read. The rows' scales
// are behind the groups: NaN for a row that is not finite.
template <class S>
struct Bf16Words {
  using Fine = Bf16Words;
  using Codec = Int16Codec<S, true>;
  using Panel = Int16Panel<S, 0>;
  using F = typename S::F;
  using I = typename S::I;
  static constexpr int kMaxRows = S::kIntRows, kMaxRowsAlone = S::kIntRowsAlone;
  static constexpr int kDirectTiles = 2, kDirectRows = 0;
  static constexpr bool kOverwrites = false, kRowScales = true;
  static constexpr int kGroupPairs = static_cast<int>(kGroup) / 2;
  static constexpr int64_t kGroupBytes = kGroupPairs * kUnitBytes;

  template <int R>
  KT_NOINLINE static void dot(const WeightLayout&, const uint8_t* block, const Range& range,
                              const uint8_t* tile, float* out, const Prefetch& prefetch,
                              const Ahead<S>& ahead) {
    Ahead<S> coming = ahead;
    constexpr int V = vectors_at_once<S>(R, S::kIntCells);
    const float* x_scale = Codec::scales(tile, R, range.groups) + range.first * R;
    for (int v0 = 0; v0 < static_cast<int>(kBlockRows) / S::kLanes; v0 += V) {
      F acc[V][R], multiple[V];
      load_sums<S>(acc, out, v0);
      load_multiples<V>(block + range.groups * kGroupBytes, v0, multiple);
      const uint8_t* x = tile + range.first * Codec::kItemBytes * R;
      const uint8_t* w = block + range.first * kGroupBytes + v0 * S::kLanes * 4;
      for (int64_t g = 0; g < range.count; ++g) {
        if (v0 == 0) coming.step();
        I sum[V][R];
        clear_sums<S>(sum);
        for (int round = 0; round < kGroupPairs / 4; ++round) {
          KT_UNROLL
          for (int pair = 0; pair < 4; ++pair, w += kUnitBytes, x += 4 * R) {
            I weight[V];
            KT_UNROLL
            for (int v = 0; v < V; ++v) {
              const uint8_t* p = w + v * S::kLanes * 4;
              ask_ahead<S>(p, prefetch);
              weight[v] = words(p, multiple[v]);
            }
            KT_UNROLL
            for (int r = 0; r < R; ++r) {
              const I item = S::broadcast4(x + r * 4);
              KT_UNROLL
              for (int v = 0; v < V; ++v) sum[v][r] = S::dot_i16(sum[v][r], weight[v], item);
            }
          }
        }
        KT_UNROLL
        for (int r = 0; r < R; ++r) {
          const F scale = S::set1(x_scale[g * R + r]);
          KT_UNROLL
          for (int v = 0; v < V; ++v) {
            acc[v][r] = S::fma(S::to_f32(sum[v][r]), scale, acc[v][r]);
          }
        }
      }
      store_sums<S>(acc, out, v0);
    }
  }

  KT_NOINLINE static void expand(const WeightLayout&, const uint8_t* block, const Range& range,
                                 Panel& panel) {
    constexpr int kVectors = static_cast<int>(kBlockRows) / S::kLanes;
    F multiple[kVectors];
    load_multiples<kVectors>(block + range.groups * kGroupBytes, 0, multiple);
    const uint8_t* w = block + range.first * kGroupBytes;
    uint8_t* to = panel.weights;
    for (int64_t unit = 0; unit < range.count * kGroupPairs;
         ++unit, w += kUnitBytes, to += kUnitBytes) {
      for (int v = 0; v < kVectors; ++v) {
        S::store_i(to + v * S::kLanes * 4, words(w + v * S::kLanes * 4, multiple[v]));
      }
    }
  }

 private:
  // What a row's numbers are multiplied by: one over its scale. Where that is 0 or NaN the integers do not matter, as
  // it multiplies their sums.
  template <int V>
  static KT_INLINE void load_multiples(const uint8_t* scales, int v0, F (&multiple)[V]) {
    KT_UNROLL
    for (int v = 0; v < V; ++v) {
      const F scale = S::load(reinterpret_cast<const float*>(scales) + (v0 + v) * S::kLanes);
      multiple[v] = S::div(S::set1(1), S::max(scale, S::set1(1e-36f)));
    }
  }
  // Two columns of a vector of rows. In a float of this size the lower bits are an integer.
  static KT_INLINE I words(const uint8_t* pairs, F multiple) {
    const F size = S::set1(0x1.8p23f);
    const F even = S::fma(FromBf16<S>::template column<0>(pairs, 0), multiple, size);
    const F odd = S::fma(FromBf16<S>::template column<1>(pairs, 0), multiple, size);
    return S::pair16(S::bits(even), S::bits(odd));
  }
};

}  // namespace ktcore::KTCORE_ISA
