// Four columns of a block's rows (a quad: one 32-bit lane a row) times 16-bit activations, which come as
// two items of four bytes. Whichever way an instruction set does it, the integers are the same.
#pragma once

namespace ktcore::KTCORE_ISA {

// Weights widened to 16 bits. Shifts widen bytes 0 and 2 of a lane together, then 1 and 3; so the items
// are columns 0 and 2, and 1 and 3.
template <class S>
struct WordQuads {
  using I = typename S::I;
  struct Weights {
    I even, odd;
  };
  using Sum = I;
  static constexpr int kCells = S::kIntCells;  // that a kernel sums at once
  static constexpr int32_t kByteBias = 0;      // that signed bytes get

  static KT_INLINE Weights of_bytes(I raw) { return {S::even_bytes(raw), S::odd_bytes(raw)}; }
  static KT_INLINE I table(const int8_t* levels) { return S::table16(levels); }
  static KT_INLINE Weights of_levels(I table, I codes) {
    return of_bytes(S::look_up(table, codes));
  }
  // Bits [kAt, kAt + kLow) of every byte of `low`, and above them [kHighAt, kHighAt + kHigh) of `high`.
  template <int kAt, int kLow, int kHighAt, int kHigh>
  static KT_INLINE Weights of_codes(I low, I high) {
    Weights w{field<kAt, kLow, 0>(low), field<kAt + 8, kLow, 0>(low)};
    if constexpr (kHigh > 0) {
      w.even = S::or_i(w.even, field<kHighAt, kHigh, kLow>(high));
      w.odd = S::or_i(w.odd, field<kHighAt + 8, kHigh, kLow>(high));
    }
    return w;
  }

  static KT_INLINE Sum start(I sum) { return sum; }
  static KT_INLINE I total(const Sum& sum) { return sum; }
  template <int V, int R>
  static KT_INLINE void add(Sum (&sum)[V][R], const Weights (&weight)[V], const uint8_t* items) {
    KT_UNROLL
    for (int r = 0; r < R; ++r) {
      const I first = S::broadcast4(items + r * 4), second = S::broadcast4(items + (R + r) * 4);
      KT_UNROLL
      for (int v = 0; v < V; ++v) {
        sum[v][r] = S::dot_i16(S::dot_i16(sum[v][r], weight[v].even, first), weight[v].odd, second);
      }
    }
  }

 private:
  // Bits [shift, shift + count) of every 16, moved to `to`.
  template <int kShift, int kCount, int kTo>
  static KT_INLINE I field(I raw) {
    const I moved = S::template shift16<kShift - kTo>(raw);
    if constexpr (kShift + kCount == 16 && kTo == 0) return moved;
    return S::and_i(moved, S::set1_i16(((1 << kCount) - 1) << kTo));
  }
};

// Weights as unsigned bytes, which take half of the operations to widen; activations as two signed
// bytes, 256 * upper + lower. The items are the upper bytes of the four columns, and the lower ones.
template <class S>
struct ByteQuads {
  using I = typename S::I;
  using Weights = I;
  struct Sum {
    I upper, lower;
  };
  static constexpr int kCells = S::kIntCells * 2 / 3;  // three registers each instead of two
  static constexpr int32_t kByteBias = 128;

  static KT_INLINE Weights of_bytes(I raw) { return S::xor_i(raw, S::set1_i8(-128)); }
  static KT_INLINE I table(const int8_t* levels) { return of_bytes(S::table16(levels)); }
  static KT_INLINE Weights of_levels(I table, I codes) { return S::look_up(table, codes); }
  template <int kAt, int kLow, int kHighAt, int kHigh>
  static KT_INLINE Weights of_codes(I low, I high) {
    const I w = S::and_i(S::template shift16<kAt>(low), S::set1_i8((1 << kLow) - 1));
    if constexpr (kHigh == 0) return w;
    return S::and_or(S::template shift16<kHighAt - kLow>(high),
                     S::set1_i8(((1 << kHigh) - 1) << kLow), w);
  }

  static KT_INLINE Sum start(I sum) { return {S::zero_i(), sum}; }
  static KT_INLINE I total(const Sum& sum) {
    return S::add_i32(S::times_256(sum.upper), sum.lower);
  }
  template <int V, int R>
  static KT_INLINE void add(Sum (&sum)[V][R], const Weights (&weight)[V], const uint8_t* items) {
    KT_UNROLL
    for (int r = 0; r < R; ++r) {
      const I upper = S::broadcast4(items + r * 4), lower = S::broadcast4(items + (R + r) * 4);
      KT_UNROLL
      for (int v = 0; v < V; ++v) {
        sum[v][r].upper = S::dot_u8(sum[v][r].upper, weight[v], upper);
        sum[v][r].lower = S::dot_u8(sum[v][r].lower, weight[v], lower);
      }
    }
  }
};

// How tiles of R rows are multiplied, and therefore encoded: widening is shared by few rows in small
// tiles, and two sums for each cell take too many registers in large ones.
template <class S, int R>
using Quads = std::conditional_t<(R <= S::kByteRows), ByteQuads<S>, WordQuads<S>>;

}  // namespace ktcore::KTCORE_ISA
