// What activations of eight bits need of 16 columns each, for AVX2 and all above it.
#pragma once

#include <cstdint>

#include "common/platform.h"

namespace ktcore::KTCORE_ISA {

// Of two times 16 floats, each as the larger and the smaller of two of them: the largest, and minus the
// smallest. Neither knows NaNs.
static KT_INLINE void extremes(__m256 first_most, __m256 first_least, __m256 last_most,
                               __m256 last_least, float* most, float* minus_least) {
  // The halves become the two 128-bit parts of one vector.
  const __m256 top = _mm256_max_ps(_mm256_permute2f128_ps(first_most, last_most, 0x20),
                                   _mm256_permute2f128_ps(first_most, last_most, 0x31));
  const __m256 low = _mm256_min_ps(_mm256_permute2f128_ps(first_least, last_least, 0x20),
                                   _mm256_permute2f128_ps(first_least, last_least, 0x31));
  const __m256 minus = _mm256_xor_ps(low, _mm256_set1_ps(-0.0f));
  __m256 both = _mm256_max_ps(_mm256_unpacklo_ps(top, minus), _mm256_unpackhi_ps(top, minus));
  both = _mm256_max_ps(both, _mm256_permute_ps(both, 0x4e));
  alignas(32) float out[8];
  _mm256_store_ps(out, both);
  most[0] = out[0];
  most[1] = out[4];
  minus_least[0] = out[1];
  minus_least[1] = out[5];
}

// The sums of two times 16 signed bytes.
static KT_INLINE void byte_sums(__m256i bytes, int32_t* sum) {
  const __m256i biased = _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));
  alignas(32) int64_t out[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(out),
                     _mm256_sad_epu8(biased, _mm256_setzero_si256()));
  sum[0] = static_cast<int32_t>(out[0] + out[1]) - 16 * 128;
  sum[1] = static_cast<int32_t>(out[2] + out[3]) - 16 * 128;
}

}  // namespace ktcore::KTCORE_ISA
