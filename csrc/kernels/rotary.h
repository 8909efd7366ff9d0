// rotary: pairs of columns turned by an angle that grows with the position (arXiv 2104.09864).
#pragma once

namespace ktcore::KTCORE_ISA {

template <class S>
static void rotary(const RotaryJob& job, ThreadPool& pool) {
  constexpr int V = Rows32<S>::kVectors;
  const int64_t half = job.rotary_size / 2;
  for_token_ranges(pool, job.tokens, job.heads * job.head_size, [&](int64_t first, int64_t end) {
    for (int64_t t = first; t < end; ++t) {
      const float* cos = job.cos + job.positions[t] * half;
      const float* sin = job.sin + job.positions[t] * half;
      for (int64_t h = 0; h < job.heads; ++h) {
        const ConstRows x = job.x.row(t, h);
        const Rows out = job.out.row(t, h);
        for (int64_t c = 0; c < half; c += kGroup) {
          const int64_t count = half - c < kGroup ? half - c : kGroup;
          typename S::F a[V], b[V], u[V], v[V], p[V], q[V];
          alignas(64) float pair[2 * kGroup], one[kGroup], other[kGroup];
          if (job.interleaved) {
            const int64_t columns = 2 * count;
            for (int64_t at = 0; at < columns; at += kGroup) {
              Rows32<S>::load(x, 0, 2 * c + at, columns - at < kGroup ? columns - at : kGroup, a);
              for (int i = 0; i < V; ++i) S::store(pair + at + i * S::kLanes, a[i]);
            }
            for (int64_t i = 0; i < kGroup; ++i) {
              one[i] = i < count ? pair[2 * i] : 0.0f;
              other[i] = i < count ? pair[2 * i + 1] : 0.0f;
            }
            for (int i = 0; i < V; ++i) {
              a[i] = S::load(one + i * S::kLanes);
              b[i] = S::load(other + i * S::kLanes);
            }
          } else {
            Rows32<S>::load(x, 0, c, count, a);
            Rows32<S>::load(x, 0, half + c, count, b);
          }
          Rows32<S>::load({cos, 0, DType::f32}, 0, c, count, u);
          Rows32<S>::load({sin, 0, DType::f32}, 0, c, count, v);
          for (int i = 0; i < V; ++i) {
            p[i] = S::sub(S::mul(a[i], u[i]), S::mul(b[i], v[i]));
            q[i] = S::add(S::mul(b[i], u[i]), S::mul(a[i], v[i]));
          }
          if (job.interleaved) {
            for (int i = 0; i < V; ++i) {
              S::store(one + i * S::kLanes, p[i]);
              S::store(other + i * S::kLanes, q[i]);
            }
            for (int64_t i = 0; i < count; ++i) {
              pair[2 * i] = one[i];
              pair[2 * i + 1] = other[i];
            }
            const int64_t columns = 2 * count;
            for (int64_t at = 0; at < columns; at += kGroup) {
              for (int i = 0; i < V; ++i) a[i] = S::load(pair + at + i * S::kLanes);
              Rows32<S>::store(out, 0, 2 * c + at, columns - at < kGroup ? columns - at : kGroup,
                               a);
            }
          } else {
            Rows32<S>::store(out, 0, c, count, p);
            Rows32<S>::store(out, 0, half + c, count, q);
          }
        }
        if (out.data == x.data) continue;
        for (int64_t c = job.rotary_size; c < job.head_size; c += kGroup) {
          const int64_t count = job.head_size - c < kGroup ? job.head_size - c : kGroup;
          typename S::F rest[V];
          Rows32<S>::load(x, 0, c, count, rest);
          Rows32<S>::store(out, 0, c, count, rest);
        }
      }
    }
  });
}

}  // namespace ktcore::KTCORE_ISA
