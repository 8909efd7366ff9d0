// AVX2 with FMA and F16C; with AVX-VNNI where this file is compiled for it.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "avx2/halves.h"
#include "common/platform.h"
#include "common/types.h"

namespace ktcore::KTCORE_ISA {

struct Simd {
  static constexpr int kLanes = 8;
  // The largest tiles, and how many (vector, row) cells are summed in 16 registers at once, beside
  // the weights and a broadcast.
  static constexpr int kIntRows = 4, kIntRowsAlone = 4, kIntCells = 8;
  static constexpr int kFloatRows = 6, kFloatCells = 12;
  using F = __m256;
  using I = __m256i;

  // ---- floats
  static KT_INLINE F zero() { return _mm256_setzero_ps(); }
  static KT_INLINE F set1(float v) { return _mm256_set1_ps(v); }
  static KT_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
  static KT_INLINE void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static KT_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
  static KT_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static KT_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static KT_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
  static KT_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  // Both return `b` when either is NaN.
  static KT_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
  static KT_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
  static KT_INLINE F round(F a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // For integral n in [-126, 128], in two halves so that neither factor overflows.
  static KT_INLINE F ldexp(F a, F n) {
    const I e = _mm256_cvtps_epi32(n);
    const I half = _mm256_srai_epi32(e, 1);
    const auto power = [](I x) {
      return _mm256_castsi256_ps(
          _mm256_slli_epi32(_mm256_add_epi32(x, _mm256_set1_epi32(127)), 23));
    };
    return _mm256_mul_ps(_mm256_mul_ps(a, power(half)), power(_mm256_sub_epi32(e, half)));
  }
  static KT_INLINE F to_f32(I a) { return _mm256_cvtepi32_ps(a); }
  static KT_INLINE float sum(F a) {
    const __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 y = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
  }

  // Rows become columns.
  static KT_INLINE void transpose(F (&r)[kLanes]) {
    F t[kLanes];
    KT_UNROLL
    for (int i = 0; i < kLanes; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    // Half k of r[4 i + j] is column 4 k + j of rows 4 i to 4 i + 3.
    KT_UNROLL
    for (int i = 0; i < kLanes; i += 4) {
      r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    KT_UNROLL
    for (int j = 0; j < 4; ++j) {
      const F a = _mm256_permute2f128_ps(r[j], r[4 + j], 0x20);
      r[4 + j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x31);
      r[j] = a;
    }
  }

  static KT_INLINE F load_bf16(const uint16_t* p) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
  }
  static KT_INLINE F load_f16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static KT_INLINE void store_f16(uint16_t* p, F v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static KT_INLINE void store_bf16(uint16_t* p, F v) {
    const I bits = _mm256_castps_si256(v);
    const I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const I rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const I nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const I quiet = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
    const I high = _mm256_srli_epi32(quiet, 16);
    const I packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }

  // ---- integers
  static KT_INLINE I zero_i() { return _mm256_setzero_si256(); }
  static KT_INLINE I set1_i32(int32_t v) { return _mm256_set1_epi32(v); }
  static KT_INLINE I mul_i32(I a, I b) { return _mm256_mullo_epi32(a, b); }
  static KT_INLINE I mul_i16(I a, I b) { return _mm256_mullo_epi16(a, b); }
  // a * b / 2^15, rounded.
  static KT_INLINE I mul_round_i16(I a, I b) { return _mm256_mulhrs_epi16(a, b); }
  static KT_INLINE I bits(F v) { return _mm256_castps_si256(v); }
  // The lower 16 bits of each lane, in both of its halves.
  static KT_INLINE I twice16(I a) {
    static constexpr int8_t kTwice[16] = {0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13};
    return look_up(a, table16(kTwice));
  }
  // The lower 16 bits of the lanes of two vectors, side by side.
  static KT_INLINE I pair16(I low, I high) {
    return _mm256_blend_epi16(low, _mm256_slli_epi32(high, 16), 0xaa);
  }
  static KT_INLINE I load_i(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static KT_INLINE I xor_i(I a, I b) { return _mm256_xor_si256(a, b); }
  static KT_INLINE I and_i(I a, I b) { return _mm256_and_si256(a, b); }
  static KT_INLINE I or_i(I a, I b) { return _mm256_or_si256(a, b); }
  static KT_INLINE I load_i8(const uint8_t* p) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static KT_INLINE I load_u8(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  // 2^(b - 127) of bytes b, which for 0 is subnormal; 255 is infinite.
  static KT_INLINE F load_e8m0(const uint8_t* p) {
    const I exponents = _mm256_slli_epi32(load_u8(p), 23);
    return _mm256_castsi256_ps(_mm256_max_epi32(exponents, set1_i32(0x00400000)));
  }
  // Weights widened to pairs of 16 bits: bytes 0 and 2 of each lane, or 1 and 3.
  static KT_INLINE I even_bytes(I a) { return _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8); }
  static KT_INLINE I odd_bytes(I a) { return _mm256_srai_epi16(a, 8); }
  // Each 16 bits shifted right by N, left where N is negative.
  template <int N>
  static KT_INLINE I shift16(I a) {
    if constexpr (N == 0) return a;
    if constexpr (N > 0) return _mm256_srli_epi16(a, N);
    if constexpr (N < 0) return _mm256_slli_epi16(a, -N);
  }
  static KT_INLINE I low_nibbles(I a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
  static KT_INLINE I high_nibbles(I a) { return low_nibbles(_mm256_srli_epi16(a, 4)); }
  // A table of 16 bytes, and what bytes 0 to 15 look up in it.
  static KT_INLINE I table16(const int8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static KT_INLINE I look_up(I table, I bytes) { return _mm256_shuffle_epi8(table, bytes); }
  static KT_INLINE I sub_i16(I a, I b) { return _mm256_sub_epi16(a, b); }
  static KT_INLINE I set1_i16(int16_t v) { return _mm256_set1_epi16(v); }
  static KT_INLINE I set1_i8(int8_t v) { return _mm256_set1_epi8(v); }
  static KT_INLINE I add_i8(I a, I b) { return _mm256_add_epi8(a, b); }
  static KT_INLINE I add_i32(I a, I b) { return _mm256_add_epi32(a, b); }
  static KT_INLINE I times_256(I a) { return _mm256_slli_epi32(a, 8); }
  static KT_INLINE void store_i(void* p, I v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
  }
  static KT_INLINE I broadcast4(const uint8_t* p) {
    int32_t v;
    std::memcpy(&v, p, 4);
    return _mm256_set1_epi32(v);
  }
  static KT_INLINE uint64_t fold(I a) {
    alignas(32) uint64_t v[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(v), a);
    return v[0] + v[1] + v[2] + v[3];
  }

  // A float no smaller than any |v|, NaN if one of them is: the bit patterns of non-negative floats
  // order as integers, infinities above all numbers and NaNs above infinity.
  static KT_INLINE float absmax32(const F* v) {
    const I mask = _mm256_set1_epi32(0x7fffffff);
    I m = _mm256_setzero_si256();
    KT_UNROLL
    for (int i = 0; i < 4; ++i) {
      m = _mm256_max_epi32(m, _mm256_and_si256(_mm256_castps_si256(v[i]), mask));
    }
    __m128i x = _mm_max_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
    x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0x4e));
    x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0xb1));
    const int32_t bits = _mm_cvtsi128_si32(x);
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
  }
  // Rounds 32 values v * inverse to 16-bit integers; `sum` is of 16 each.
  static KT_INLINE void encode16(const F* v, F inverse, ItemOrder order, uint8_t* out,
                                 int32_t* sum) {
    I n[4];
    KT_UNROLL
    for (int i = 0; i < 4; ++i) n[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], inverse));
    if (order == ItemOrder::bytes) {
      I upper[4], lower[4];
      KT_UNROLL
      for (int i = 0; i < 4; ++i) {
        upper[i] = _mm256_srai_epi32(_mm256_add_epi32(n[i], _mm256_set1_epi32(128)), 8);
        lower[i] = _mm256_srai_epi32(_mm256_slli_epi32(n[i], 24), 24);
      }
      const I high = pack_bytes(upper), low = pack_bytes(lower);
      const I first = _mm256_unpacklo_epi32(high, low), second = _mm256_unpackhi_epi32(high, low);
      store_i(out, _mm256_permute2x128_si256(first, second, 0x20));
      store_i(out + 32, _mm256_permute2x128_si256(first, second, 0x31));
    } else {
      KT_UNROLL
      for (int i = 0; i < 2; ++i) {
        // The pack works within 128-bit halves: put its quarters back in order.
        const I q = _mm256_permute4x64_epi64(_mm256_packs_epi32(n[2 * i], n[2 * i + 1]), 0xd8);
        store_i(out + 32 * i, order == ItemOrder::pairs
                                  ? q
                                  : _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(q, 0xd8), 0xd8));
      }
    }
    KT_UNROLL
    for (int i = 0; i < 2; ++i) {
      const I s = _mm256_add_epi32(n[2 * i], n[2 * i + 1]);
      __m128i x = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
      x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4e));
      x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0xb1));
      sum[i] = _mm_cvtsi128_si32(x);
    }
  }
  // Of the first and of the last 16 of 32 values.
  static KT_INLINE void halves(const F* v, float* most, float* minus_least) {
    extremes(max(v[0], v[1]), min(v[0], v[1]), max(v[2], v[3]), min(v[2], v[3]), most, minus_least);
  }
  // Rounds 32 values v * inverse to int8.
  static KT_INLINE __m256i quantize32(const F* v, F inverse) {
    I n[4];
    KT_UNROLL
    for (int i = 0; i < 4; ++i) n[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], inverse));
    return pack_bytes(n);
  }
  // 32 integers that fit in bytes. The packs work within 128-bit halves; one permutation of 32-bit
  // words restores the order.
  static KT_INLINE I pack_bytes(const I* n) {
    const I bytes =
        _mm256_packs_epi16(_mm256_packs_epi32(n[0], n[1]), _mm256_packs_epi32(n[2], n[3]));
    return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }

  static KT_INLINE I add_i16(I a, I b) { return _mm256_add_epi16(a, b); }
  static KT_INLINE I and_or(I a, I mask, I b) { return or_i(and_i(a, mask), b); }

  // ---- dot products, per 32-bit lane: dot_i16 of two 16-bit weights with two 16-bit activations,
  // dot_u8 of four unsigned bytes with four signed ones. Tiles of up to kByteRows rows take the latter,
  // which must then be exact.
#if defined(KTCORE_VNNI)
  static constexpr bool kByteDots = true;
  static constexpr int kByteRows = 2;
#if defined(KT_ASM)
  // As intrinsics, GCC copies sums from register to register.
  static KT_INLINE I dot_i16(I acc, I w, I a) {
    __asm__("%{vex%} vpdpwssd %2, %1, %0" : "+x"(acc) : "x"(w), "x"(a));
    return acc;
  }
  static KT_INLINE I dot_u8(I acc, I w, I a) {
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(w), "x"(a));
    return acc;
  }
#else
  static KT_INLINE I dot_i16(I acc, I w, I a) { return _mm256_dpwssd_avx_epi32(acc, w, a); }
  static KT_INLINE I dot_u8(I acc, I w, I a) { return _mm256_dpbusd_avx_epi32(acc, w, a); }
#endif
#else
  static constexpr bool kByteDots = false;
  static constexpr int kByteRows = 0;
  static KT_INLINE I dot_i16(I acc, I w, I a) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(w, a));
  }
  static KT_INLINE I pairs_u8(I w, I a) { return _mm256_maddubs_epi16(w, a); }
  static KT_INLINE I add_pairs(I pairs) { return _mm256_madd_epi16(pairs, set1_i16(1)); }
  static KT_INLINE I dot_u8(I acc, I w, I a) { return add_i32(acc, add_pairs(pairs_u8(w, a))); }
#endif

  // The two bf16 of each lane, as floats.
  static KT_INLINE F low_bf16(I raw) { return _mm256_castsi256_ps(_mm256_slli_epi32(raw, 16)); }
  static KT_INLINE F high_bf16(I raw) {
    return _mm256_castsi256_ps(_mm256_and_si256(raw, _mm256_set1_epi32(-65536)));
  }

  // Byte N of each lane as e4m3: its exponent and mantissa become a float's, 120 too small, which
  // the product makes up for; subnormals as well. The codes of NaN come out as 480.
  template <int N>
  static KT_INLINE F e4m3(I raw) {
    I v = raw;
    if constexpr (N < 3) v = _mm256_slli_epi32(raw, 24 - 8 * N);
    v = _mm256_and_si256(_mm256_srai_epi32(v, 4), _mm256_set1_epi32(static_cast<int>(0x87f00000)));
    return _mm256_mul_ps(_mm256_castsi256_ps(v), _mm256_set1_ps(0x1p120f));
  }

  static constexpr bool kBf16Dot = false;

  static KT_INLINE void prefetch_l2(const uint8_t* p) {
    _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1);
  }
  static KT_INLINE void prefetch(const uint8_t* p) {
    _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
  }
};

}  // namespace ktcore::KTCORE_ISA
