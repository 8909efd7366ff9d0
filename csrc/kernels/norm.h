// rms_norm: out = x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467), of x or of x + residual.
#pragma once

namespace ktcore::KTCORE_ISA {

// Tokens per task, so that a task reads at least about 64 KiB.
static KT_INLINE int64_t tokens_per_task(int64_t columns) { return ceil_div(16384, columns); }

// Calls f(first, end) for ranges of the tokens, of `columns` values each.
template <class F>
static void for_token_ranges(ThreadPool& pool, int64_t tokens, int64_t columns, F&& f) {
  const int64_t step = tokens_per_task(columns);
  parallel_for(pool, ceil_div(tokens, step), [&](int64_t task, int) {
    const int64_t first = task * step;
    f(first, first + step < tokens ? first + step : tokens);
  });
}

// 1 / sqrt(mean square + eps) of a row, in float64 where squares leave float32's range.
template <class S>
static float inverse_rms(const ConstRows& row, int64_t size, float eps) {
  constexpr int V = Rows32<S>::kVectors;
  typename S::F v[V], sum[V];
  for (auto& each : sum) each = S::zero();
  for (int64_t c = 0; c < size; c += kGroup) {
    Rows32<S>::load(row, 0, c, size - c < kGroup ? size - c : kGroup, v);
    for (int i = 0; i < V; ++i) sum[i] = S::fma(v[i], v[i], sum[i]);
  }
  typename S::F all = sum[0];
  for (int i = 1; i < V; ++i) all = S::add(all, sum[i]);
  const float total = S::sum(all);
  if (total <= 3.4028235e38f) {
    return static_cast<float>(1.0 / sqrt(static_cast<double>(total) / static_cast<double>(size) +
                                         static_cast<double>(eps)));
  }
  double wide = 0;
  alignas(64) float values[kGroup];
  for (int64_t c = 0; c < size; c += kGroup) {
    Rows32<S>::load(row, 0, c, size - c < kGroup ? size - c : kGroup, v);
    for (int i = 0; i < V; ++i) S::store(values + i * S::kLanes, v[i]);
    for (float x : values) wide += static_cast<double>(x) * static_cast<double>(x);
  }
  return static_cast<float>(1.0 /
                            sqrt(wide / static_cast<double>(size) + static_cast<double>(eps)));
}

template <class S>
static void rms_norm(const NormJob& job, ThreadPool& pool) {
  constexpr int V = Rows32<S>::kVectors;
  const ConstRows weight{job.weight, 0, DType::f32};
  for_token_ranges(pool, job.tokens, job.heads * job.size, [&](int64_t first, int64_t end) {
    for (int64_t t = first; t < end; ++t) {
      for (int64_t h = 0; h < job.heads; ++h) {
        ConstRows x = job.x.row(t, h);
        typename S::F v[V], w[V];
        if (job.residual.data != nullptr) {
          const ConstRows residual = job.residual.row(t, h);
          const Rows sum = job.sum.row(t, h);
          for (int64_t c = 0; c < job.size; c += kGroup) {
            const int64_t count = job.size - c < kGroup ? job.size - c : kGroup;
            Rows32<S>::load(x, 0, c, count, v);
            Rows32<S>::load(residual, 0, c, count, w);
            for (int i = 0; i < V; ++i) v[i] = S::add(v[i], w[i]);
            Rows32<S>::store(sum, 0, c, count, v);
          }
          x = {sum.data, 0, sum.dtype};
        }
        const typename S::F inverse = S::set1(inverse_rms<S>(x, job.size, job.eps));
        const Rows out = job.out.row(t, h);
        for (int64_t c = 0; c < job.size; c += kGroup) {
          const int64_t count = job.size - c < kGroup ? job.size - c : kGroup;
          Rows32<S>::load(x, 0, c, count, v);
          Rows32<S>::load(weight, 0, c, count, w);
          for (int i = 0; i < V; ++i) v[i] = S::mul(S::mul(v[i], inverse), w[i]);
          Rows32<S>::store(out, 0, c, count, v);
        }
      }
    }
  });
}

}  // namespace ktcore::KTCORE_ISA
