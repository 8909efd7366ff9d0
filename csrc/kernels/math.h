// Exponential and the gated activations, on vectors.
#pragma once

namespace ktcore::KTCORE_ISA {

// e^x to about 1e-7 relative; NaN stays NaN. Large x gives infinity, so that a gate can shut
// completely; small x saturates above the denormals.
template <class S>
static KT_INLINE typename S::F exp(typename S::F x) {
  using F = typename S::F;
  x = S::min(S::set1(89.0f), S::max(S::set1(-87.0f), x));
  const F n = S::round(S::mul(x, S::set1(1.44269504088896341f)));
  // x - n ln 2, with ln 2 in two parts so that the product with n is exact.
  F r = S::fma(n, S::set1(-0.693359375f), x);
  r = S::fma(n, S::set1(2.12194440e-4f), r);
  // The Taylor series to r^6: |r| <= ln(2) / 2 leaves 1.2e-7.
  F p = S::set1(1.0f / 720);
  p = S::fma(p, r, S::set1(1.0f / 120));
  p = S::fma(p, r, S::set1(1.0f / 24));
  p = S::fma(p, r, S::set1(1.0f / 6));
  p = S::fma(p, r, S::set1(0.5f));
  p = S::fma(p, r, S::set1(1.0f));
  p = S::fma(p, r, S::set1(1.0f));
  return S::ldexp(p, n);
}

// x * sigmoid(y)
template <class S>
static KT_INLINE typename S::F gate_by_sigmoid(typename S::F x, typename S::F y) {
  const typename S::F one = S::set1(1.0f);
  return S::div(x, S::add(one, exp<S>(S::sub(S::zero(), y))));
}

// What an expert's gate and up make of the input of its down.
template <class S>
static KT_INLINE typename S::F activate(Activation activation, typename S::F gate,
                                        typename S::F up) {
  using F = typename S::F;
  if (activation == Activation::silu) return S::mul(gate_by_sigmoid<S>(gate, gate), up);
  if (activation == Activation::swiglu_oai) {
    // (The limits come first, so that NaN stays NaN.)
    gate = S::min(S::set1(7.0f), gate);
    up = S::max(S::set1(-7.0f), S::min(S::set1(7.0f), up));
    const F gated = gate_by_sigmoid<S>(gate, S::mul(gate, S::set1(1.702f)));
    return S::mul(gated, S::add(up, S::set1(1.0f)));
  }
  // The tanh form of GELU: (1 + tanh(u)) / 2 = sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3).
  const F cube = S::mul(S::mul(gate, gate), gate);
  const F u = S::fma(cube, S::set1(0.044715f), gate);
  return S::mul(gate_by_sigmoid<S>(gate, S::mul(u, S::set1(1.5957691216057308f))), up);
}

}  // namespace ktcore::KTCORE_ISA
