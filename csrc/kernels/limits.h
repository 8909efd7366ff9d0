// Loops that reach the machine's limits, to hold the kernels against: sixteen or so independent
// sums, everything in registers. Each returns the operations done; a multiply-add counts as two.
#pragma once

namespace ktcore::KTCORE_ISA {

static constexpr int kChains = 12;

// The result of a spin must be used, or the compiler drops the loop.
template <class S>
static KT_INLINE double keep(uint64_t folded, double operations) {
  volatile uint64_t sink = folded;
  (void)sink;
  return operations;
}

// Chains of `dot(sum, w, a)` of integers, each of so many operations a lane.
template <class S, class Dot>
static KT_INLINE double spin_integers(int64_t iterations, double operations, Dot dot) {
  typename S::I acc[kChains];
  alignas(64) uint8_t bytes[64];
  for (int i = 0; i < 64; ++i) bytes[i] = static_cast<uint8_t>(129 + i);
  typename S::I w = S::load_i(bytes);
  KT_UNROLL
  for (int i = 0; i < kChains; ++i) acc[i] = S::set1_i32(i);
  const typename S::I a = S::set1_i32(0x01020304);
  for (int64_t n = 0; n < iterations; ++n) {
    KT_UNROLL
    for (int i = 0; i < kChains; ++i) {
      KT_IN_REGISTER(w);  // or a product that all chains share is computed once
      acc[i] = dot(acc[i], w, a);
    }
  }
  typename S::I all = acc[0];
  for (int i = 1; i < kChains; ++i) all = S::xor_i(all, acc[i]);
  return keep<S>(S::fold(all), operations * S::kLanes * kChains * static_cast<double>(iterations));
}

template <class S>
static double spin_int8(int64_t iterations) {
  using I = typename S::I;
  return spin_integers<S>(iterations, 8.0, [](I sum, I w, I a) { return S::dot_u8(sum, w, a); });
}

// Chains of `step(sum)`, each of so many operations a lane.
template <class S, class Step>
static KT_INLINE double spin_floats(int64_t iterations, double operations, Step step) {
  typename S::F acc[kChains];
  KT_UNROLL
  for (int i = 0; i < kChains; ++i) acc[i] = S::set1(static_cast<float>(i));
  for (int64_t n = 0; n < iterations; ++n) {
    KT_UNROLL
    for (int i = 0; i < kChains; ++i) acc[i] = step(acc[i]);
  }
  typename S::F all = acc[0];
  for (int i = 1; i < kChains; ++i) all = S::add(all, acc[i]);
  const float total = S::sum(all);
  uint32_t bits;
  std::memcpy(&bits, &total, 4);
  return keep<S>(bits, operations * S::kLanes * kChains * static_cast<double>(iterations));
}

template <class S>
static double spin_f32(int64_t iterations) {
  const typename S::F w = S::set1(0.999f), a = S::set1(0.5f);
  return spin_floats<S>(iterations, 2.0, [&](typename S::F sum) { return S::fma(sum, w, a); });
}

// Where bf16 has no dot products, it is multiplied as integers of 16 bits, or as float32.
template <class S>
static double spin_bf16(int64_t iterations) {
  using I = typename S::I;
  using F = typename S::F;
  if constexpr (S::kBf16Dot) {
    alignas(64) uint8_t bytes[64];
    for (int i = 0; i < 64; ++i) bytes[i] = static_cast<uint8_t>(i % 2 ? 0x3f : 0x80);
    const I w = S::load_i(bytes), a = S::broadcast4(bytes);
    return spin_floats<S>(iterations, 4.0, [&](F sum) { return S::dot_bf16(sum, w, a); });
  } else if constexpr (kFloatsAsInt16<S>) {
    return spin_integers<S>(iterations, 4.0, [](I sum, I w, I a) { return S::dot_i16(sum, w, a); });
  } else {
    return spin_f32<S>(iterations);
  }
}

template <class S>
static uint64_t read(const uint8_t* data, size_t bytes) {
  constexpr size_t kStep = 4 * sizeof(typename S::I);
  typename S::I a = S::zero_i(), b = a, c = a, d = a;
  for (size_t i = 0; i + kStep <= bytes; i += kStep) {
    a = S::xor_i(a, S::load_i(data + i));
    b = S::xor_i(b, S::load_i(data + i + sizeof(typename S::I)));
    c = S::xor_i(c, S::load_i(data + i + 2 * sizeof(typename S::I)));
    d = S::xor_i(d, S::load_i(data + i + 3 * sizeof(typename S::I)));
  }
  return S::fold(S::xor_i(S::xor_i(a, b), S::xor_i(c, d)));
}

}  // namespace ktcore::KTCORE_ISA
