// AVX-512 (F, BW, DQ, VL), with VNNI, and with BF16 dot products and VBMI, where this file is compiled
// for them.
#pragma once

#if defined(KTCORE_EMULATE_AVX512)
#include "avx512/emulated.h"
#else
#include <immintrin.h>
#endif

#include <bit>
#include <cstring>

#include "avx2/halves.h"
#include "common/platform.h"
#include "common/types.h"

namespace ktcore::KTCORE_ISA {

// The bytes of the bf16 of each e4m3 code without its sign; 480 for that of NaN.
struct E4m3Bytes {
  alignas(64) uint8_t low[128] = {}, high[128] = {};
  constexpr E4m3Bytes() {
    for (int code = 0; code < 128; ++code) {
      int exponent = code >> 3, mantissa = (code & 7) << 4;
      if (exponent == 0 && mantissa != 0) {  // subnormal here, not as bf16
        for (exponent = 1; mantissa < 128; mantissa *= 2) --exponent;
        mantissa -= 128;
      }
      const int bits = code == 0 ? 0 : (exponent + 120) << 7 | mantissa;
      low[code] = static_cast<uint8_t>(bits & 255);
      high[code] = static_cast<uint8_t>(bits >> 8);
    }
  }
};
static constexpr E4m3Bytes kE4m3;

struct Simd {
  static constexpr int kLanes = 16;
  // The largest tiles, and how many (vector, row) cells are summed at once, which for up to kIntRows rows are all in
  // registers beside the weights and a broadcast. Seven and eight rows keep some in memory, and widen weights once
  // where two tiles would widen them twice.
  static constexpr int kIntRows = 6, kIntRowsAlone = 8, kIntCells = 16;
  static constexpr int kFloatRows = 12, kFloatCells = 24;
  using F = __m512;
  using I = __m512i;

  // ---- floats
  static KT_INLINE F zero() { return _mm512_setzero_ps(); }
  static KT_INLINE F set1(float v) { return _mm512_set1_ps(v); }
  static KT_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
  static KT_INLINE void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static KT_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
  static KT_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static KT_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static KT_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
  static KT_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  // Both return `b` when either is NaN.
  static KT_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
  static KT_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
  static KT_INLINE F round(F a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static KT_INLINE F ldexp(F a, F n) { return _mm512_scalef_ps(a, n); }
  static KT_INLINE F to_f32(I a) { return _mm512_cvtepi32_ps(a); }
  static KT_INLINE float sum(F a) { return _mm512_reduce_add_ps(a); }

  // Rows become columns.
  static KT_INLINE void transpose(F (&r)[kLanes]) {
    F t[kLanes];
    KT_UNROLL
    for (int i = 0; i < kLanes; i += 2) {
      t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    const auto low = [](F a, F b) {
      return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
    };
    const auto high = [](F a, F b) {
      return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
    };
    // Quarter k of r[4 i + j] is column 4 k + j of rows 4 i to 4 i + 3.
    KT_UNROLL
    for (int i = 0; i < kLanes; i += 4) {
      r[i] = low(t[i], t[i + 2]);
      r[i + 1] = high(t[i], t[i + 2]);
      r[i + 2] = low(t[i + 1], t[i + 3]);
      r[i + 3] = high(t[i + 1], t[i + 3]);
    }
    KT_UNROLL
    for (int j = 0; j < 4; ++j) {
      const F a = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88);
      const F b = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd);
      const F c = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
      const F d = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
      r[j] = _mm512_shuffle_f32x4(a, c, 0x88);
      r[4 + j] = _mm512_shuffle_f32x4(b, d, 0x88);
      r[8 + j] = _mm512_shuffle_f32x4(a, c, 0xdd);
      r[12 + j] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
  }

  static KT_INLINE F load_bf16(const uint16_t* p) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }
  static KT_INLINE F load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static KT_INLINE void store_f16(uint16_t* p, F v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  // Round to nearest even, in integers: the BF16 extension's converter would flush denormals.
  static KT_INLINE __m256i round_bf16(F v) {
    const I bits = _mm512_castps_si512(v);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const I rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const I quiet = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(quiet, 16));
  }
  // The nearest bf16, of two as near the larger; of a NaN, anything.
  static KT_INLINE F nearest_bf16(F v) {
    return high_bf16(add_i32(_mm512_castps_si512(v), set1_i32(0x8000)));
  }
  // What is a bf16 already.
  static KT_INLINE void store_upper(uint16_t* p, F v) {
    const I bits = _mm512_srli_epi32(_mm512_castps_si512(v), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bits));
  }
  static KT_INLINE void store_bf16(uint16_t* p, F v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_bf16(v));
  }

  // ---- integers
  static KT_INLINE I zero_i() { return _mm512_setzero_si512(); }
  static KT_INLINE I set1_i32(int32_t v) { return _mm512_set1_epi32(v); }
  static KT_INLINE I mul_i32(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static KT_INLINE I mul_i16(I a, I b) { return _mm512_mullo_epi16(a, b); }
  // a * b / 2^15, rounded.
  static KT_INLINE I mul_round_i16(I a, I b) { return _mm512_mulhrs_epi16(a, b); }
  static KT_INLINE I bits(F v) { return _mm512_castps_si512(v); }
  // The lower 16 bits of each lane, in both of its halves.
  static KT_INLINE I twice16(I a) {
    static constexpr int8_t kTwice[16] = {0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13};
    return look_up(a, table16(kTwice));
  }
  // The lower 16 bits of the lanes of two vectors, side by side.
  static KT_INLINE I pair16(I low, I high) {
    return and_or(low, set1_i32(0xffff), _mm512_slli_epi32(high, 16));
  }
  static KT_INLINE I load_i(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static KT_INLINE I xor_i(I a, I b) { return _mm512_xor_si512(a, b); }
  static KT_INLINE I and_i(I a, I b) { return _mm512_and_si512(a, b); }
  static KT_INLINE I or_i(I a, I b) { return _mm512_or_si512(a, b); }
  static KT_INLINE I load_i8(const uint8_t* p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static KT_INLINE I load_u8(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  // 2^(b - 127) of bytes b, which for 0 is subnormal; 255 is infinite.
  static KT_INLINE F load_e8m0(const uint8_t* p) {
    const I exponents = _mm512_slli_epi32(load_u8(p), 23);
    return _mm512_castsi512_ps(_mm512_max_epi32(exponents, set1_i32(0x00400000)));
  }
  // Weights widened to pairs of 16 bits: bytes 0 and 2 of each lane, or 1 and 3.
  static KT_INLINE I even_bytes(I a) { return _mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8); }
  static KT_INLINE I odd_bytes(I a) { return _mm512_srai_epi16(a, 8); }
  // Each 16 bits shifted right by N, left where N is negative.
  template <int N>
  static KT_INLINE I shift16(I a) {
    if constexpr (N == 0) return a;
    if constexpr (N > 0) return _mm512_srli_epi16(a, N);
    if constexpr (N < 0) return _mm512_slli_epi16(a, -N);
  }
  static KT_INLINE I low_nibbles(I a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
  static KT_INLINE I high_nibbles(I a) { return low_nibbles(_mm512_srli_epi16(a, 4)); }
  // A table of 16 bytes, and what bytes 0 to 15 look up in it.
  static KT_INLINE I table16(const int8_t* p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static KT_INLINE I look_up(I table, I bytes) { return _mm512_shuffle_epi8(table, bytes); }
  static KT_INLINE I sub_i16(I a, I b) { return _mm512_sub_epi16(a, b); }
  static KT_INLINE I set1_i16(int16_t v) { return _mm512_set1_epi16(v); }
  static KT_INLINE I set1_i8(int8_t v) { return _mm512_set1_epi8(v); }
  static KT_INLINE I add_i8(I a, I b) { return _mm512_add_epi8(a, b); }
  static KT_INLINE I add_i32(I a, I b) { return _mm512_add_epi32(a, b); }
  static KT_INLINE I times_256(I a) { return _mm512_slli_epi32(a, 8); }
  static KT_INLINE void store_i(void* p, I v) { _mm512_storeu_si512(p, v); }
  static KT_INLINE I broadcast4(const uint8_t* p) {
    int32_t v;
    std::memcpy(&v, p, 4);
    return _mm512_set1_epi32(v);
  }
  // Sums that may pass the largest number and begin anew: the intrinsics that reduce vectors are
  // additions of signed numbers in GCC's headers, for which that is an error.
  static KT_INLINE uint64_t fold(I a) {
    alignas(64) uint64_t v[8];
    _mm512_storeu_si512(v, a);
    uint64_t sum = 0;
    for (uint64_t each : v) sum += each;
    return sum;
  }
  static KT_INLINE int32_t sum_i32(I a) {
    const __m256i b = _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
    __m128i x = _mm_add_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
    x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
  }

  // A float no smaller than any |v|, NaN if one of them is: the bit patterns of non-negative floats
  // order as integers, infinities above all numbers and NaNs above infinity.
  static KT_INLINE float absmax32(const F* v) {
    const I mask = _mm512_set1_epi32(0x7fffffff);
    const I a = _mm512_and_si512(_mm512_castps_si512(v[0]), mask);
    const I b = _mm512_and_si512(_mm512_castps_si512(v[1]), mask);
    const int32_t m = _mm512_reduce_max_epi32(_mm512_max_epi32(a, b));
    float out;
    std::memcpy(&out, &m, 4);
    return out;
  }
  // Rounds 32 values v * inverse to 16-bit integers, in the order of WordQuads or, if `bytes`, of
  // ByteQuads; `sum` is of 16 each.
  static KT_INLINE void encode16(const F* v, F inverse, ItemOrder order, uint8_t* out,
                                 int32_t* sum) {
    KT_UNROLL
    for (int i = 0; i < 2; ++i) {
      const I n = _mm512_cvtps_epi32(_mm512_mul_ps(v[i], inverse));
      sum[i] = sum_i32(n);
      auto* to = reinterpret_cast<__m128i*>(out + 32 * i);
      if (order == ItemOrder::bytes) {
        const I carried = _mm512_add_epi32(n, _mm512_set1_epi32(128));
        const __m128i upper = _mm512_cvtepi32_epi8(_mm512_srai_epi32(carried, 8));
        const __m128i lower = _mm512_cvtepi32_epi8(n);
        _mm_storeu_si128(to, _mm_unpacklo_epi32(upper, lower));
        _mm_storeu_si128(to + 1, _mm_unpackhi_epi32(upper, lower));
      } else {
        const __m256i q = _mm512_cvtepi32_epi16(n);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                            order == ItemOrder::pairs
                                ? q
                                : _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(q, 0xd8), 0xd8));
      }
    }
  }
  // Of the first and of the last 16 of 32 values.
  static KT_INLINE void halves(const F* v, float* most, float* minus_least) {
    const __m256 a = _mm512_castps512_ps256(v[0]), b = _mm512_extractf32x8_ps(v[0], 1);
    const __m256 c = _mm512_castps512_ps256(v[1]), d = _mm512_extractf32x8_ps(v[1], 1);
    extremes(_mm256_max_ps(a, b), _mm256_min_ps(a, b), _mm256_max_ps(c, d), _mm256_min_ps(c, d),
             most, minus_least);
  }
  // Rounds 32 values v * inverse to int8.
  static KT_INLINE __m256i quantize32(const F* v, F inverse) {
    const __m128i first = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(v[0], inverse)));
    const __m128i last = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(v[1], inverse)));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(first), last, 1);
  }

  static KT_INLINE I add_i16(I a, I b) { return _mm512_add_epi16(a, b); }
  static KT_INLINE I and_or(I a, I mask, I b) {
    return _mm512_ternarylogic_epi32(a, mask, b, 0xea);
  }

  // ---- dot products, per 32-bit lane: dot_i16 of two 16-bit weights with two 16-bit activations,
  // dot_u8 of four unsigned bytes with four signed ones. Tiles of up to kByteRows rows take the latter,
  // which must then be exact.
#if defined(KTCORE_VNNI)
  static constexpr bool kByteDots = true;
  static constexpr int kByteRows = 3;
#if defined(KT_ASM)
  // As intrinsics, GCC copies a third of the sums from register to register.
  static KT_INLINE I dot_i16(I acc, I w, I a) {
    __asm__("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(a));
    return acc;
  }
  static KT_INLINE I dot_u8(I acc, I w, I a) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(a));
    return acc;
  }
#else
  static KT_INLINE I dot_i16(I acc, I w, I a) { return _mm512_dpwssd_epi32(acc, w, a); }
  static KT_INLINE I dot_u8(I acc, I w, I a) { return _mm512_dpbusd_epi32(acc, w, a); }
#endif
#else
  static constexpr bool kByteDots = false;
  static constexpr int kByteRows = 0;
  static KT_INLINE I dot_i16(I acc, I w, I a) {
    return _mm512_add_epi32(acc, _mm512_madd_epi16(w, a));
  }
  static KT_INLINE I pairs_u8(I w, I a) { return _mm512_maddubs_epi16(w, a); }
  static KT_INLINE I add_pairs(I pairs) { return _mm512_madd_epi16(pairs, set1_i16(1)); }
  static KT_INLINE I dot_u8(I acc, I w, I a) { return add_i32(acc, add_pairs(pairs_u8(w, a))); }
#endif

  // The two bf16 of each lane, as floats.
  static KT_INLINE F low_bf16(I raw) { return _mm512_castsi512_ps(_mm512_slli_epi32(raw, 16)); }
  static KT_INLINE F high_bf16(I raw) {
    return _mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(-65536)));
  }

  // The upper halves of floats: two bf16 a lane, cut off.
  static KT_INLINE I upper_halves(F low, F high) {
    return and_or(_mm512_castps_si512(high), set1_i32(-65536),
                  _mm512_srli_epi32(_mm512_castps_si512(low), 16));
  }
  // 1 + b / 256 of byte N of each lane, unsigned: the upper bits of a float's mantissa.
  template <int N>
  static KT_INLINE F one_and_byte(I bytes) {
    I v = bytes;
    if constexpr (N < 2) v = _mm512_slli_epi32(bytes, 15 - 8 * N);
    if constexpr (N >= 2) v = _mm512_srli_epi32(bytes, 8 * N - 15);
    return _mm512_castsi512_ps(and_or(v, set1_i32(0x007f8000), set1_i32(0x3f800000)));
  }

  // Byte N of each lane as e4m3: its exponent and mantissa become a float's, 120 too small, which
  // the product makes up for; subnormals as well. The codes of NaN come out as 480.
  template <int N>
  static KT_INLINE F e4m3(I raw) {
    I v = raw;
    if constexpr (N < 3) v = _mm512_slli_epi32(raw, 24 - 8 * N);
    v = _mm512_and_si512(_mm512_srai_epi32(v, 4), _mm512_set1_epi32(static_cast<int>(0x87f00000)));
    return _mm512_mul_ps(_mm512_castsi512_ps(v), _mm512_set1_ps(0x1p120f));
  }

#if defined(KTCORE_BF16)
  // Bytes N and N + 2 of each lane, of e4m3, as two bf16. Looked up: dot products take subnormal numbers
  // for zero, of which shifted bits would make some. The codes of NaN come out as 480.
  template <int N>
  static KT_INLINE I e4m3_pair(I raw) {
    const I low = look_up128(kE4m3.low, raw);
    const I high = and_or(raw, set1_i8(-128), look_up128(kE4m3.high, raw));
    const I first = set1_i16(0xff);
    return N == 0 ? and_or(low, first, _mm512_slli_epi16(high, 8))
                  : or_i(_mm512_srli_epi16(low, 8), _mm512_andnot_si512(first, high));
  }
  // A table of 128 bytes, and what the lower seven bits of bytes look up in it.
  static KT_INLINE I look_up128(const uint8_t* table, I bytes) {
    return _mm512_permutex2var_epi8(load_i(table), bytes, load_i(table + 64));
  }

  // Dot products of two bf16 weights with two bf16 activations, per 32-bit lane.
  static constexpr bool kBf16Dot = true;
  static KT_INLINE F dot_bf16(F acc, I w, I a) {
#if defined(KT_ASM)
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(w), "v"(a));
    return acc;
#else
    return _mm512_dpbf16_ps(acc, std::bit_cast<__m512bh>(w), std::bit_cast<__m512bh>(a));
#endif
  }
#else
  static constexpr bool kBf16Dot = false;
#endif

  static KT_INLINE void prefetch_l2(const uint8_t* p) {
    _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1);
  }
  static KT_INLINE void prefetch(const uint8_t* p) {
    _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
  }
};

}  // namespace ktcore::KTCORE_ISA
