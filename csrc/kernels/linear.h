// linear: out[t] = weight x_t + bias, one pass over the weight's blocks for every portion of the tokens.
#pragma once

namespace ktcore::KTCORE_ISA {

template <class S, class Format>
static void linear(const LinearJob& job, ThreadPool& pool) {
  const int64_t groups = ceil_div(job.cols, kGroup);
  const int planes = job.rounding.planes;
  const int64_t token_bytes = token_bytes_of<Format>(planes, job.cols);
  const int64_t block = job.layout->block_bytes(job.cols);

  const auto token_of = [&](int32_t i) { return job.order == nullptr ? i : job.order[i]; };
  if (job.tile_count < job.tokens) {
    parallel_for(pool, job.tile_count, [&](int64_t i, int) {
      gather_tile<Format>(job.tiles[i], job.cols, planes, job.tokens_encoded,
                          job.tiles_encoded + job.tiles[i].first * token_bytes, token_of);
    });
  }

  const int64_t blocks = ceil_div(job.rows, kBlockRows);
  const int64_t step = blocks_per_task(block);
  const int64_t portion = tiles_of_portion<Format>(token_bytes), tasks = ceil_div(blocks, step);
  parallel_for(pool, ceil_div(job.tile_count, portion) * tasks, [&](int64_t task, int) {
    const TokenTile* tiles = job.tiles + task / tasks * portion;
    const int64_t rest = job.tiles + job.tile_count - tiles;
    const int n = static_cast<int>(rest < portion ? rest : portion);
    const int64_t begin = task % tasks * step;
    const int64_t end = begin + step < blocks ? begin + step : blocks;
    alignas(64) float c[kProductRows * kBlockRows];
    const EncodedTiles encoded{job.tiles_encoded, 0, token_bytes, job.tokens_encoded, job.order};
    for (int64_t b = begin; b < end; ++b) {
      const int64_t left = job.rows - b * kBlockRows;
      const int64_t count = left < kBlockRows ? left : kBlockRows;
      typename S::F bias[Rows32<S>::kVectors];
      for (auto& v : bias) v = S::zero();
      if (job.bias != nullptr) {
        Rows32<S>::load({job.bias, 0, DType::f32}, 0, b * kBlockRows, count, bias);
      }
      for (int first = 0, alike; first < n; first += alike) {
        const TokenTile* some = tiles + first;
        for (alike = 1; first + alike < n && some[alike].fine == some->fine;) ++alike;
        multiply_alike<S, Format>(some->fine, *job.layout, job.weight + b * block, groups, some,
                                  alike, planes, encoded, c, job.prefetch);
        for (int i = 0; i < alike; ++i) {
          const float* from = c + (some[i].first - some->first) * planes * kBlockRows;
          for (int32_t t = 0; t < some[i].tokens; ++t, from += kBlockRows) {
            typename S::F v[Rows32<S>::kVectors];
            for (int k = 0; k < Rows32<S>::kVectors; ++k) {
              v[k] = S::add(S::load(from + k * S::kLanes), bias[k]);
            }
            Rows32<S>::store(job.out, token_of(some[i].first + t), b * kBlockRows, count, v);
          }
        }
      }
    }
  });
}

}  // namespace ktcore::KTCORE_ISA
