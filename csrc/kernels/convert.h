// quantize and dequantize, between rows of floats and the stored weight formats.
#pragma once

namespace ktcore::KTCORE_ISA {

static constexpr int64_t kRowsPerTask = 16;

static KT_INLINE float float_of_bf16(uint16_t v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

static KT_INLINE uint16_t bf16_of_float(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  if (v != v) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <class S>
static KT_INLINE void dequantize_row(const DequantizeJob& job, int64_t row) {
  const int64_t groups = ceil_div(job.cols, kGroup);
  const Rows out{job.out, job.cols, job.dtype};
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t left = job.cols - g * kGroup;
    const int64_t count = left < kGroup ? left : kGroup;
    typename S::F v[Rows32<S>::kVectors];
    if (job.format == StoredFormat::bf16) {
      Rows32<S>::load({job.data, job.cols, DType::bf16}, row, g * kGroup, count, v);
    } else {
      alignas(64) float values[kGroup] = {};
      float scale;
      if (job.format == StoredFormat::int8) {
        const auto* q = static_cast<const int8_t*>(job.data) + row * job.cols + g * kGroup;
        for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(q[i]);
        scale = static_cast<const float*>(job.scales)[row];
      } else {
        const auto* q = static_cast<const uint8_t*>(job.data) + (row * groups + g) * (kGroup / 2);
        for (int64_t i = 0; i < kGroup / 2; ++i) {
          values[2 * i] = static_cast<float>((q[i] & 15) - 8);
          values[2 * i + 1] = static_cast<float>((q[i] >> 4) - 8);
        }
        scale = float_of_bf16(static_cast<const uint16_t*>(job.scales)[row * groups + g]);
      }
      for (int i = 0; i < Rows32<S>::kVectors; ++i) {
        v[i] = S::mul(S::load(values + i * S::kLanes), S::set1(scale));
      }
    }
    Rows32<S>::store(out, row, g * kGroup, count, v);
  }
}

template <class S>
static void dequantize(const DequantizeJob& job, ThreadPool& pool) {
  parallel_for(pool, ceil_div(job.rows, kRowsPerTask), [&](int64_t task, int) {
    for (int64_t r = task * kRowsPerTask; r < (task + 1) * kRowsPerTask && r < job.rows; ++r) {
      dequantize_row<S>(job, r);
    }
  });
}

template <class S>
static KT_INLINE void quantize_row_int8(const QuantizeJob& job, int64_t row) {
  constexpr int kVectors = Rows32<S>::kVectors;
  const int64_t groups = ceil_div(job.cols, kGroup);
  uint32_t amax_bits = 0;
  typename S::F v[kVectors];
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t left = job.cols - g * kGroup;
    Rows32<S>::load(job.x, row, g * kGroup, left < kGroup ? left : kGroup, v);
    const float m = S::absmax32(v);
    uint32_t bits;
    std::memcpy(&bits, &m, 4);
    amax_bits = bits > amax_bits ? bits : amax_bits;  // orders NaN above everything
  }
  float amax;
  std::memcpy(&amax, &amax_bits, 4);
  const bool finite = amax <= 3.4028235e38f;
  const bool tiny = amax < 1e-30f;
  static_cast<float*>(job.scales)[row] =
      !finite ? std::numeric_limits<float>::quiet_NaN() : (tiny ? 0.0f : amax / 127.0f);
  const typename S::F inverse = S::set1(finite && !tiny ? 127.0f / amax : 0.0f);
  auto* out = static_cast<int8_t*>(job.data) + row * job.cols;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t left = job.cols - g * kGroup;
    const int64_t count = left < kGroup ? left : kGroup;
    Rows32<S>::load(job.x, row, g * kGroup, count, v);
    alignas(64) int8_t q[kGroup];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), S::quantize32(v, inverse));
    std::memcpy(out + g * kGroup, q, static_cast<size_t>(count));
  }
}

// The scale of a group of 4-bit integers in [-8, 7] with the least squared error: for rounding by a
// trial scale the best scale is the projection sum(x q) / sum(q^2), which lowers the error by
// sum(x q)^2 / sum(q^2), so try scales around max / -8 and keep the one with the largest gain.
template <class S>
static KT_INLINE float search_int4_scale(const typename S::F* v) {
  using F = typename S::F;
  constexpr int kVectors = Rows32<S>::kVectors;
  alignas(64) float x[kGroup];
  for (int i = 0; i < kVectors; ++i) S::store(x + i * S::kLanes, v[i]);
  float extreme = 0.0f;
  for (int64_t i = 0; i < kGroup; ++i) {
    const float a = x[i] < 0 ? -x[i] : x[i], b = extreme < 0 ? -extreme : extreme;
    extreme = a > b ? x[i] : extreme;
  }
  if (extreme > -1e-30f && extreme < 1e-30f) return 0.0f;
  float best_gain = -1.0f, best_scale = 0.0f;
  for (int step = -12; step <= 12; ++step) {
    const F inverse = S::set1((-8.0f + 0.1f * static_cast<float>(step)) / extreme);
    F xq = S::zero(), qq = S::zero();
    for (int i = 0; i < kVectors; ++i) {
      const F q = S::max(S::set1(-8.0f), S::min(S::set1(7.0f), S::round(S::mul(v[i], inverse))));
      xq = S::fma(v[i], q, xq);
      qq = S::fma(q, q, qq);
    }
    const float dot = S::sum(xq), norm = S::sum(qq);
    const float gain = norm > 0 ? dot * (dot / norm) : 0.0f;
    if (gain > best_gain) {
      best_gain = gain;
      best_scale = norm > 0 ? dot / norm : 0.0f;
    }
  }
  return best_scale;
}

template <class S>
static KT_INLINE void quantize_row_int4(const QuantizeJob& job, int64_t row) {
  constexpr int kVectors = Rows32<S>::kVectors;
  const int64_t groups = ceil_div(job.cols, kGroup);
  typename S::F v[kVectors];
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t left = job.cols - g * kGroup;
    Rows32<S>::load(job.x, row, g * kGroup, left < kGroup ? left : kGroup, v);
    const bool finite = S::absmax32(v) <= 3.4028235e38f;
    const uint16_t stored = finite ? bf16_of_float(search_int4_scale<S>(v)) : 0x7fc0;
    static_cast<uint16_t*>(job.scales)[row * groups + g] = stored;
    // Round by the scale as stored. The padding of a short group is 8: zero.
    const float scale = float_of_bf16(stored);
    const float inverse = finite && scale != 0.0f ? 1.0f / scale : 0.0f;
    alignas(64) float q[kGroup];
    for (int i = 0; i < kVectors; ++i) {
      const typename S::F n = S::round(S::mul(v[i], S::set1(inverse)));
      S::store(q + i * S::kLanes, S::max(S::set1(-8.0f), S::min(S::set1(7.0f), n)));
    }
    auto* out = static_cast<uint8_t*>(job.data) + (row * groups + g) * (kGroup / 2);
    for (int64_t i = 0; i < kGroup / 2; ++i) {
      const int low = finite ? static_cast<int>(q[2 * i]) + 8 : 8;
      const int high = finite ? static_cast<int>(q[2 * i + 1]) + 8 : 8;
      out[i] = static_cast<uint8_t>(low | high << 4);
    }
  }
}

template <class S>
static void quantize(const QuantizeJob& job, ThreadPool& pool) {
  parallel_for(pool, ceil_div(job.rows, kRowsPerTask), [&](int64_t task, int) {
    for (int64_t r = task * kRowsPerTask; r < (task + 1) * kRowsPerTask && r < job.rows; ++r) {
      if (job.format == StoredFormat::int8) {
        quantize_row_int8<S>(job, r);
      } else if (job.format == StoredFormat::int4_g32) {
        quantize_row_int4<S>(job, r);
      } else {
        const Rows out{job.data, job.cols, DType::bf16};
        for (int64_t k = 0; k < job.cols; k += kGroup) {
          const int64_t count = job.cols - k < kGroup ? job.cols - k : kGroup;
          typename S::F v[Rows32<S>::kVectors];
          Rows32<S>::load(job.x, r, k, count, v);
          Rows32<S>::store(out, r, k, count, v);
        }
      }
    }
  });
}

}  // namespace ktcore::KTCORE_ISA
