// How the codes of a packed block become integers.
#pragma once

namespace ktcore::KTCORE_ISA {

// Codes of kBits bits or, with kTable, of 16 levels: four columns (a quad) are taken out of the bytes of a
// lane at a time. Those of 3, 5 and 6 bits are in two parts: the lower 2 or 4 bits in units of their own, the
// upper ones in others.
template <class S, int kBits, bool kTable>
struct Codes {
  using I = typename S::I;
  static constexpr CodeParts kParts = CodeParts::of(kBits);
  static constexpr int kLow = kParts.low, kHigh = kParts.high;
  static constexpr bool kPairs = false;                  // of columns 0 and 1, 2 and 3
  static constexpr bool kBiased = !kTable && kBits < 8;  // as 16 bits
  static constexpr float kUnit = 1;
  template <int R>
  using Quad = Quads<S, R>;
  // A bit of each of 32 columns and 32 rows is one unit.
  static constexpr int64_t kBytes = kBits * kUnitBytes;  // of a group
  // How many quads share the bytes of a unit.
  static constexpr int kLowQuads = 8 / kLow, kHighQuads = kHigh == 0 ? 8 : 8 / kHigh;

  // What all codes are larger by than the weights they stand for.
  template <class Quad>
  static KT_INLINE int32_t bias(const WeightLayout& layout) {
    return kTable || kBits == 8 ? Quad::kByteBias : layout.bias;
  }
  // Quad Q of a group out of the units that hold its lower and upper bits.
  template <class Quad, int Q>
  static KT_INLINE typename Quad::Weights widen(I low, I high, I levels) {
    constexpr int kAt = Q % kLowQuads * kLow, kHighAt = kHigh == 0 ? 0 : Q % kHighQuads * kHigh;
    if constexpr (kTable) {
      return Quad::of_levels(levels, Q % 2 == 0 ? S::low_nibbles(low) : S::high_nibbles(low));
    } else if constexpr (kBits == 8) {
      return Quad::of_bytes(low);
    } else {
      return Quad::template of_codes<kAt, kLow, kHighAt, kHigh>(low, high);
    }
  }
};

// e4m3 (OCP 8-bit floating point, OFP8), whose bits are s eee | e mmm, as 16-bit integers in units of 1/32: products of
// (8 + mmm) << e, times 2^10, and +-4^eee, cut to their upper bits with rounding. What is below a quarter loses some of
// its bits, none of it more than half a unit, which is 0.0035 % of the largest; subnormal numbers come out as zero.
template <class S>
struct F8Codes {
  using I = typename S::I;
  static constexpr CodeParts kParts = CodeParts::of(8);
  static constexpr int kLow = 8, kHigh = 0, kLowQuads = 1, kHighQuads = 8;
  static constexpr bool kPairs = true, kBiased = false;
  static constexpr float kUnit = 1.0f / kF8Multiple;
  static constexpr int64_t kBytes = 8 * kUnitBytes;
  template <int R>
  using Quad = WordQuads<S>;

  template <class>
  static KT_INLINE int32_t bias(const WeightLayout&) {
    return 0;
  }
  template <class, int>
  static KT_INLINE typename WordQuads<S>::Weights widen(I raw, I, I) {
    static constexpr int8_t kMantissa[16] = {32, 36, 40, 44, 48, 52,  56,  60,
                                             64, 72, 80, 88, 96, 104, 112, 120};
    static constexpr int8_t kLower[16] = {1, 4, 16, 64, 0, 0, 0, 0, -1, -4, -16, -64, 0, 0, 0, 0};
    static constexpr int8_t kUpper[16] = {0,  0,  0,  0,  1,  4,  16,  64,
                                          -1, -1, -1, -1, -1, -4, -16, -64};
    const I high = S::high_nibbles(raw),
            mantissa = S::look_up(S::table16(kMantissa), S::low_nibbles(raw));
    const I lower = S::look_up(S::table16(kLower), high),
            upper = S::look_up(S::table16(kUpper), high);
    const I even = S::set1_i16(0x00ff), odd = S::set1_i16(-256);
    return {S::mul_round_i16(S::template shift16<-8>(mantissa),
                             S::and_or(lower, even, S::template shift16<-8>(upper))),
            S::mul_round_i16(S::and_i(mantissa, odd),
                             S::and_or(upper, odd, S::template shift16<8>(lower)))};
  }
};

}  // namespace ktcore::KTCORE_ISA
