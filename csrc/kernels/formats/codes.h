// How the codes of a packed block become integers.
#pragma once

namespace ktcore::KTCORE_ISA {

// Reads a unit's vector of rows and, if kAsks, asks for what will be read later.
template <class S, bool kAsks>
static KT_INLINE typename S::I read_unit(const uint8_t* p, Prefetch prefetch) {
  if constexpr (kAsks) ask_ahead<S>(p, prefetch);
  return S::load_i(p);
}

// Codes of kBits bits, which with kTable number levels: four columns (a quad) are taken out of the bytes of a
// lane at a time. Those of 3, 5 and 6 bits may be in several units.
template <class S, int kBits, bool kTable>
struct Codes {
  using I = typename S::I;
  // A bit of each of 32 columns and 32 rows is one unit.
  static constexpr int kUnits = kBits;                   // of a group
  static constexpr bool kPairs = false;                  // of columns 0 and 1, 2 and 3
  static constexpr bool kBiased = !kTable && kBits < 8;  // as 16 bits
  static constexpr bool kNibbles = kBits == 2;  // whether two sets of inner scales may be such
  static constexpr float kUnit = 1;
  template <int R>
  using Quad = Quads<S, R>;
  static constexpr int64_t kBytes = kUnits * kUnitBytes;
  static constexpr bool kSplit = 8 % kBits != 0;  // whether codes may be in parts

  // What all codes are larger by than the weights they stand for.
  template <class Quad>
  static KT_INLINE int32_t bias(const WeightLayout& layout) {
    return kTable || kBits == 8 ? Quad::kByteBias : layout.bias;
  }
  // Reads the units of a vector of rows that quad Q needs and those before it did not.
  template <int Q, bool kAsks>
  static KT_INLINE void read(I (&units)[kUnits], const uint8_t* codes, Prefetch prefetch) {
    read_parts<Q, kAsks>(units, codes, prefetch,
                         std::make_integer_sequence<int, quad_parts(kBits, Q).count>());
  }
  // Quad Q of a group out of its units.
  template <class Quad, int Q>
  static KT_INLINE typename Quad::Weights widen(const I (&units)[kUnits], I levels) {
    constexpr CodePart kFirst = quad_parts(kBits, Q).part[0];
    const I first = units[kFirst.unit];
    if constexpr (kBits == 8) {
      return Quad::of_bytes(first);
    } else if constexpr (!kTable && !kSplit) {
      return Quad::template of_field<kFirst.at, kBits>(first);
    } else {
      const I codes = join<Q, 1>(units, S::and_i(moved<kFirst>(units), mask<kFirst>()));
      return kTable ? Quad::of_levels(levels, codes) : Quad::of_codes(codes);
    }
  }

 private:
  template <int Q, bool kAsks, int... N>
  static KT_INLINE void read_parts(I (&units)[kUnits], const uint8_t* codes, Prefetch prefetch,
                                   std::integer_sequence<int, N...>) {
    (read_part<Q, kAsks, quad_parts(kBits, Q).part[N].unit>(units, codes, prefetch), ...);
  }
  template <int Q, bool kAsks, int kNumber>
  static KT_INLINE void read_part(I (&units)[kUnits], const uint8_t* codes, Prefetch prefetch) {
    if constexpr (first_quad(kNumber) == Q) {
      units[kNumber] = read_unit<S, kAsks>(codes + kNumber * kUnitBytes, prefetch);
    }
  }
  static constexpr int first_quad(int unit) {
    for (int quad = 0;; ++quad) {
      const QuadParts parts = quad_parts(kBits, quad);
      for (int i = 0; i < parts.count; ++i) {
        if (parts.part[i].unit == unit) return quad;
      }
    }
  }

  // A part of a quad's codes where it is in them, among other bits; which bits are its own; and `codes` with the parts
  // from number N on as well.
  template <CodePart kPart>
  static KT_INLINE I moved(const I (&units)[kUnits]) {
    return S::template shift16<kPart.at - kPart.to>(units[kPart.unit]);
  }
  template <CodePart kPart>
  static KT_INLINE I mask() {
    return S::set1_i8(((1 << kPart.bits) - 1) << kPart.to);
  }
  template <int Q, int N>
  static KT_INLINE I join(const I (&units)[kUnits], I codes) {
    constexpr QuadParts kParts = quad_parts(kBits, Q);
    if constexpr (N == kParts.count) {
      return codes;
    } else {
      constexpr CodePart kPart = kParts.part[N];
      return join<Q, N + 1>(units, S::and_or(moved<kPart>(units), mask<kPart>(), codes));
    }
  }
};

// e4m3 (OCP 8-bit floating point, OFP8), whose bits are s eee | e mmm, as 16-bit integers in units of 1/32: products of
// (8 + mmm) << e, times 2^10, and +-4^eee, cut to their upper bits with rounding. What is below a quarter loses some of
// its bits, none of it more than half a unit, which is 0.0035 % of the largest; subnormal numbers come out as zero.
template <class S>
struct F8Codes {
  using I = typename S::I;
  static constexpr int kUnits = 8;
  static constexpr bool kPairs = true, kBiased = false, kNibbles = false;
  static constexpr float kUnit = 1.0f / kF8Multiple;
  static constexpr int64_t kBytes = kUnits * kUnitBytes;
  template <int R>
  using Quad = WordQuads<S>;

  template <class>
  static KT_INLINE int32_t bias(const WeightLayout&) {
    return 0;
  }
  template <int Q, bool kAsks>
  static KT_INLINE void read(I (&units)[kUnits], const uint8_t* codes, Prefetch prefetch) {
    units[Q] = read_unit<S, kAsks>(codes + Q * kUnitBytes, prefetch);
  }
  template <class, int Q>
  static KT_INLINE typename WordQuads<S>::Weights widen(const I (&units)[kUnits], I) {
    const I raw = units[Q];
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
