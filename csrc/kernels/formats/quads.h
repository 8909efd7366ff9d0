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
  // Codes that are bytes, and those that are bits [kAt, kAt + kBits) of every byte.
  static KT_INLINE Weights of_codes(I bytes) {
    return {S::and_i(bytes, S::set1_i16(255)), S::template shift16<8>(bytes)};
  }
  template <int kAt, int kBits>
  static KT_INLINE Weights of_field(I raw) {
    return {field<kAt, kBits>(raw), field<kAt + 8, kBits>(raw)};
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
  // Bits [kAt, kAt + kBits) of every 16.
  template <int kAt, int kBits>
  static KT_INLINE I field(I raw) {
    const I moved = S::template shift16<kAt>(raw);
    if constexpr (kAt + kBits == 16) return moved;
    return S::and_i(moved, S::set1_i16((1 << kBits) - 1));
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
  static KT_INLINE Weights of_codes(I bytes) { return bytes; }
  template <int kAt, int kBits>
  static KT_INLINE Weights of_field(I raw) {
    return S::and_i(S::template shift16<kAt>(raw), S::set1_i8((1 << kBits) - 1));
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
