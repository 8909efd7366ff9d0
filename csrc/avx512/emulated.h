// The AVX-512 intrinsics that simd.h uses, each as two halves of AVX2, so that the AVX-512 kernels'
// source runs, and is tested, on a processor without AVX-512. Semantics as Intel's Intrinsics Guide
// gives them. For development only (-DKTCORE_EMULATE_AVX512=ON); it says nothing about speed.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace ktcore::emulated {

struct F512 {
  __m256 lo, hi;
};
struct I512 {
  __m256i lo, hi;
};

#define KT_HALVES2(type, name, op) \
  static inline type name(type a, type b) { return {op(a.lo, b.lo), op(a.hi, b.hi)}; }
#define KT_SHIFT(name, op) \
  static inline I512 name(I512 a, int n) { return {op(a.lo, n), op(a.hi, n)}; }

KT_HALVES2(F512, add_ps, _mm256_add_ps)
KT_HALVES2(F512, sub_ps, _mm256_sub_ps)
KT_HALVES2(F512, mul_ps, _mm256_mul_ps)
KT_HALVES2(F512, div_ps, _mm256_div_ps)
KT_HALVES2(F512, min_ps, _mm256_min_ps)
KT_HALVES2(F512, max_ps, _mm256_max_ps)
KT_HALVES2(I512, add_epi8, _mm256_add_epi8)
KT_HALVES2(I512, add_epi16, _mm256_add_epi16)
KT_HALVES2(I512, add_epi32, _mm256_add_epi32)
KT_HALVES2(I512, andnot_si512, _mm256_andnot_si256)
KT_HALVES2(I512, sub_epi16, _mm256_sub_epi16)
KT_HALVES2(I512, mullo_epi16, _mm256_mullo_epi16)
KT_HALVES2(I512, mulhrs_epi16, _mm256_mulhrs_epi16)
KT_HALVES2(I512, mullo_epi32, _mm256_mullo_epi32)
KT_HALVES2(I512, max_epi32, _mm256_max_epi32)
KT_HALVES2(I512, and_si512, _mm256_and_si256)
KT_HALVES2(I512, or_si512, _mm256_or_si256)
KT_HALVES2(I512, xor_si512, _mm256_xor_si256)
KT_HALVES2(I512, madd_epi16, _mm256_madd_epi16)
KT_HALVES2(I512, maddubs_epi16, _mm256_maddubs_epi16)
KT_HALVES2(I512, shuffle_epi8, _mm256_shuffle_epi8)
KT_SHIFT(slli_epi16, _mm256_slli_epi16)
KT_SHIFT(srli_epi16, _mm256_srli_epi16)
KT_SHIFT(srai_epi16, _mm256_srai_epi16)
KT_SHIFT(slli_epi32, _mm256_slli_epi32)
KT_SHIFT(srli_epi32, _mm256_srli_epi32)
KT_SHIFT(srai_epi32, _mm256_srai_epi32)

static inline F512 setzero_ps() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline I512 setzero_si512() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
static inline F512 set1_ps(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
static inline I512 set1_epi32(int v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
static inline I512 set1_epi16(short v) { return {_mm256_set1_epi16(v), _mm256_set1_epi16(v)}; }
static inline I512 set1_epi8(char v) { return {_mm256_set1_epi8(v), _mm256_set1_epi8(v)}; }
static inline I512 broadcast_i32x4(__m128i a) {
  return {_mm256_broadcastsi128_si256(a), _mm256_broadcastsi128_si256(a)};
}
static inline F512 loadu_ps(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void storeu_ps(float* p, F512 v) {
  _mm256_storeu_ps(p, v.lo);
  _mm256_storeu_ps(p + 8, v.hi);
}
static inline I512 loadu_si512(const void* p) {
  const auto* q = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
static inline void storeu_si512(void* p, I512 v) {
  auto* q = static_cast<__m256i*>(p);
  _mm256_storeu_si256(q, v.lo);
  _mm256_storeu_si256(q + 1, v.hi);
}
static inline F512 fmadd_ps(F512 a, F512 b, F512 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
static inline F512 castsi512_ps(I512 a) {
  return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)};
}
static inline I512 castps_si512(F512 a) {
  return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)};
}
static inline F512 cvtepi32_ps(I512 a) {
  return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)};
}
static inline I512 cvtps_epi32(F512 a) {
  return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)};
}
static inline I512 cvtepu16_epi32(__m256i a) {
  return {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)),
          _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1))};
}
static inline I512 cvtepi8_epi32(__m128i a) {
  return {_mm256_cvtepi8_epi32(a), _mm256_cvtepi8_epi32(_mm_srli_si128(a, 8))};
}
static inline I512 cvtepu8_epi32(__m128i a) {
  return {_mm256_cvtepu8_epi32(a), _mm256_cvtepu8_epi32(_mm_srli_si128(a, 8))};
}
static inline F512 cvtph_ps(__m256i a) {
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(a)),
          _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))};
}
template <int kRounding>
static inline __m256i cvtps_ph(F512 a) {
  return _mm256_set_m128i(_mm256_cvtps_ph(a.hi, kRounding), _mm256_cvtps_ph(a.lo, kRounding));
}
// imm8 bits 7:4 are the number of fraction bits, here 0.
template <int kRounding>
static inline F512 roundscale_ps(F512 a) {
  return {_mm256_round_ps(a.lo, kRounding), _mm256_round_ps(a.hi, kRounding)};
}

// Truncation, not saturation.
static inline __m256i cvtepi32_epi16(I512 a) {
  alignas(32) int from[16];
  alignas(32) short to[16];
  storeu_si512(from, a);
  for (int i = 0; i < 16; ++i) to[i] = static_cast<short>(from[i]);
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(to));
}
static inline __m128i cvtepi32_epi8(I512 a) {
  alignas(32) int from[16];
  alignas(16) signed char to[16];
  storeu_si512(from, a);
  for (int i = 0; i < 16; ++i) to[i] = static_cast<signed char>(from[i]);
  return _mm_load_si128(reinterpret_cast<const __m128i*>(to));
}

// a * 2^floor(b).
static inline F512 scalef_ps(F512 a, F512 b) {
  float x[16], y[16];
  storeu_ps(x, a);
  storeu_ps(y, b);
  for (int i = 0; i < 16; ++i) x[i] = std::ldexp(x[i], static_cast<int>(std::floor(y[i])));
  return loadu_ps(x);
}

using Mask16 = unsigned short;
template <int kPredicate>
static inline Mask16 cmp_ps_mask(F512 a, F512 b) {
  return static_cast<Mask16>(_mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, kPredicate)) |
                             _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, kPredicate)) << 8);
}
static inline I512 mask_mov_epi32(I512 source, Mask16 mask, I512 a) {
  int x[16], y[16];
  storeu_si512(x, source);
  storeu_si512(y, a);
  for (int i = 0; i < 16; ++i) x[i] = mask >> i & 1 ? y[i] : x[i];
  return loadu_si512(x);
}

// The reduction macros fold halves: the order of the sum is theirs.
static inline float reduce_add_ps(F512 a) {
  const __m256 eight = _mm256_add_ps(a.hi, a.lo);
  const __m128 four = _mm_add_ps(_mm256_extractf128_ps(eight, 1), _mm256_castps256_ps128(eight));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
KT_HALVES2(F512, unpacklo_ps, _mm256_unpacklo_ps)
KT_HALVES2(F512, unpackhi_ps, _mm256_unpackhi_ps)
// Pairs of floats as doubles: the same bits, so there is no type of their own.
static inline __m256 unpacklo_pairs(__m256 a, __m256 b) { return _mm256_shuffle_ps(a, b, 0x44); }
static inline __m256 unpackhi_pairs(__m256 a, __m256 b) { return _mm256_shuffle_ps(a, b, 0xee); }
KT_HALVES2(F512, unpacklo_pd, unpacklo_pairs)
KT_HALVES2(F512, unpackhi_pd, unpackhi_pairs)
template <int N>
static inline F512 shuffle_f32x4(F512 a, F512 b) {
  float from[2][16], to[16];
  storeu_ps(from[0], a);
  storeu_ps(from[1], b);
  for (int i = 0; i < 4; ++i) std::memcpy(to + 4 * i, from[i / 2] + 4 * (N >> 2 * i & 3), 16);
  return loadu_ps(to);
}
static inline __m256i castsi512_si256(I512 a) { return a.lo; }
static inline __m256 castps512_ps256(F512 a) { return a.lo; }
template <int N>
static inline __m256 extractf32x8_ps(F512 a) {
  return N == 0 ? a.lo : a.hi;
}
template <int N>
static inline __m256i extracti64x4_epi64(I512 a) {
  return N == 0 ? a.lo : a.hi;
}
static inline int reduce_max_epi32(I512 a) {
  int v[16];
  storeu_si512(v, a);
  int most = v[0];
  for (int x : v) most = x > most ? x : most;
  return most;
}

// Unsigned bytes of a with signed bytes of b, four to a lane, without saturation.
static inline __m256i dpbusd_half(__m256i acc, __m256i a, __m256i b) {
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(255)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
  return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}
static inline I512 dpbusd_epi32(I512 acc, I512 a, I512 b) {
  return {dpbusd_half(acc.lo, a.lo, b.lo), dpbusd_half(acc.hi, a.hi, b.hi)};
}
static inline I512 dpwssd_epi32(I512 acc, I512 a, I512 b) {
  return add_epi32(acc, madd_epi16(a, b));
}

static inline I512 permutex2var_epi8(I512 a, I512 index, I512 b) {
  alignas(64) uint8_t table[128], v[64];
  storeu_si512(table, a);
  storeu_si512(table + 64, b);
  storeu_si512(v, index);
  for (uint8_t& x : v) x = table[x & 127];
  return loadu_si512(v);
}
// (a & b) | c, which is all that is asked of it.
template <int N>
static inline I512 ternarylogic_epi32(I512 a, I512 b, I512 c) {
  static_assert(N == 0xea);
  return or_si512(and_si512(a, b), c);
}

// Pairs of bf16: the odd product is added first; denormal inputs and results count as zero.
static inline F512 flush(F512 a) {
  float v[16];
  storeu_ps(v, a);
  for (float& x : v) {
    if (std::fpclassify(x) == FP_SUBNORMAL) x = std::copysign(0.0f, x);
  }
  return loadu_ps(v);
}
static inline F512 dpbf16_ps(F512 acc, I512 a, I512 b) {
  const I512 high = set1_epi32(static_cast<int>(0xffff0000u));
  const auto even = [](I512 v) { return flush(castsi512_ps(slli_epi32(v, 16))); };
  const auto odd = [&](I512 v) { return flush(castsi512_ps(and_si512(v, high))); };
  acc = flush(fmadd_ps(odd(a), odd(b), flush(acc)));
  return flush(fmadd_ps(even(a), even(b), acc));
}

#undef KT_HALVES2
#undef KT_SHIFT

}  // namespace ktcore::emulated

#define __m512 ::ktcore::emulated::F512
#define __m512i ::ktcore::emulated::I512
#define __m512bh ::ktcore::emulated::I512
#define __mmask16 ::ktcore::emulated::Mask16

#define _mm512_add_epi8 ::ktcore::emulated::add_epi8
#define _mm512_add_epi16 ::ktcore::emulated::add_epi16
#define _mm512_add_epi32 ::ktcore::emulated::add_epi32
#define _mm512_add_ps ::ktcore::emulated::add_ps
#define _mm512_and_si512 ::ktcore::emulated::and_si512
#define _mm512_andnot_si512 ::ktcore::emulated::andnot_si512
#define _mm512_broadcast_i32x4 ::ktcore::emulated::broadcast_i32x4
#define _mm512_castpd_ps(a) (a)
#define _mm512_castps512_ps256 ::ktcore::emulated::castps512_ps256
#define _mm512_castps_pd(a) (a)
#define _mm512_castps_si512 ::ktcore::emulated::castps_si512
#define _mm512_castsi512_ps ::ktcore::emulated::castsi512_ps
#define _mm512_castsi512_si256 ::ktcore::emulated::castsi512_si256
#define _mm512_cmp_ps_mask(a, b, p) ::ktcore::emulated::cmp_ps_mask<p>(a, b)
#define _mm512_cvtepi32_epi16 ::ktcore::emulated::cvtepi32_epi16
#define _mm512_cvtepi32_epi8 ::ktcore::emulated::cvtepi32_epi8
#define _mm512_cvtepi32_ps ::ktcore::emulated::cvtepi32_ps
#define _mm512_cvtepi8_epi32 ::ktcore::emulated::cvtepi8_epi32
#define _mm512_cvtepu8_epi32 ::ktcore::emulated::cvtepu8_epi32
#define _mm512_cvtepu16_epi32 ::ktcore::emulated::cvtepu16_epi32
#define _mm512_cvtph_ps ::ktcore::emulated::cvtph_ps
#define _mm512_cvtps_epi32 ::ktcore::emulated::cvtps_epi32
#define _mm512_cvtps_ph(a, r) ::ktcore::emulated::cvtps_ph<r>(a)
#define _mm512_div_ps ::ktcore::emulated::div_ps
#define _mm512_dpbf16_ps ::ktcore::emulated::dpbf16_ps
#define _mm512_dpbusd_epi32 ::ktcore::emulated::dpbusd_epi32
#define _mm512_dpwssd_epi32 ::ktcore::emulated::dpwssd_epi32
#define _mm512_extractf32x8_ps(a, n) ::ktcore::emulated::extractf32x8_ps<n>(a)
#define _mm512_extracti64x4_epi64(a, n) ::ktcore::emulated::extracti64x4_epi64<n>(a)
#define _mm512_fmadd_ps ::ktcore::emulated::fmadd_ps
#define _mm512_loadu_ps ::ktcore::emulated::loadu_ps
#define _mm512_loadu_si512 ::ktcore::emulated::loadu_si512
#define _mm512_madd_epi16 ::ktcore::emulated::madd_epi16
#define _mm512_maddubs_epi16 ::ktcore::emulated::maddubs_epi16
#define _mm512_mask_mov_epi32 ::ktcore::emulated::mask_mov_epi32
#define _mm512_max_epi32 ::ktcore::emulated::max_epi32
#define _mm512_max_ps ::ktcore::emulated::max_ps
#define _mm512_min_ps ::ktcore::emulated::min_ps
#define _mm512_mul_ps ::ktcore::emulated::mul_ps
#define _mm512_mulhrs_epi16 ::ktcore::emulated::mulhrs_epi16
#define _mm512_mullo_epi16 ::ktcore::emulated::mullo_epi16
#define _mm512_mullo_epi32 ::ktcore::emulated::mullo_epi32
#define _mm512_or_si512 ::ktcore::emulated::or_si512
#define _mm512_permutex2var_epi8 ::ktcore::emulated::permutex2var_epi8
#define _mm512_reduce_add_ps ::ktcore::emulated::reduce_add_ps
#define _mm512_reduce_max_epi32 ::ktcore::emulated::reduce_max_epi32
#define _mm512_roundscale_ps(a, r) ::ktcore::emulated::roundscale_ps<r>(a)
#define _mm512_scalef_ps ::ktcore::emulated::scalef_ps
#define _mm512_set1_epi16 ::ktcore::emulated::set1_epi16
#define _mm512_set1_epi32 ::ktcore::emulated::set1_epi32
#define _mm512_set1_epi8 ::ktcore::emulated::set1_epi8
#define _mm512_shuffle_epi8 ::ktcore::emulated::shuffle_epi8
#define _mm512_set1_ps ::ktcore::emulated::set1_ps
#define _mm512_setzero_ps ::ktcore::emulated::setzero_ps
#define _mm512_setzero_si512 ::ktcore::emulated::setzero_si512
#define _mm512_shuffle_f32x4(a, b, n) ::ktcore::emulated::shuffle_f32x4<n>(a, b)
#define _mm512_slli_epi16 ::ktcore::emulated::slli_epi16
#define _mm512_slli_epi32 ::ktcore::emulated::slli_epi32
#define _mm512_srai_epi16 ::ktcore::emulated::srai_epi16
#define _mm512_srai_epi32 ::ktcore::emulated::srai_epi32
#define _mm512_srli_epi16 ::ktcore::emulated::srli_epi16
#define _mm512_srli_epi32 ::ktcore::emulated::srli_epi32
#define _mm512_storeu_ps ::ktcore::emulated::storeu_ps
#define _mm512_storeu_si512 ::ktcore::emulated::storeu_si512
#define _mm512_sub_epi16 ::ktcore::emulated::sub_epi16
#define _mm512_sub_ps ::ktcore::emulated::sub_ps
#define _mm512_ternarylogic_epi32(a, b, c, n) ::ktcore::emulated::ternarylogic_epi32<n>(a, b, c)
#define _mm512_unpackhi_pd ::ktcore::emulated::unpackhi_pd
#define _mm512_unpackhi_ps ::ktcore::emulated::unpackhi_ps
#define _mm512_unpacklo_pd ::ktcore::emulated::unpacklo_pd
#define _mm512_unpacklo_ps ::ktcore::emulated::unpacklo_ps
#define _mm512_xor_si512 ::ktcore::emulated::xor_si512
