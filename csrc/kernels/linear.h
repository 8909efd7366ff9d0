// linear: out[t] = weight x_t + bias, one pass over the weight's blocks.
#pragma once

namespace ktcore::KTCORE_ISA {

template <class S, class Format>
static void linear(const LinearJob& job, ThreadPool& pool) {
  using Codec = typename Format::Codec;
  const int64_t groups = ceil_div(job.cols, kGroup);
  const int64_t token_bytes = job.rounding.planes * Codec::row_bytes(job.cols);
  const int64_t block = job.layout->block_bytes(job.cols);

  encode_tokens<S, Codec>(pool, job.x, job.tokens, job.cols, job.columns, job.rounding,
                          job.tokens_encoded);
  if (job.tile_count < job.tokens) {
    gather_tiles<Codec>(pool, job.tiles, job.tile_count, job.cols, job.rounding.planes,
                        job.tokens_encoded, job.tiles_encoded, [](int32_t token) { return token; });
  }

  const int64_t blocks = ceil_div(job.rows, kBlockRows);
  const int64_t step = blocks_per_task(block);
  parallel_for(pool, ceil_div(blocks, step), [&](int64_t task, int) {
    const int64_t begin = task * step;
    const int64_t end = begin + step < blocks ? begin + step : blocks;
    alignas(64) float c[kProductRows * kBlockRows];
    const EncodedTiles encoded{job.tiles_encoded, token_bytes, job.tokens_encoded};
    for (int64_t b = begin; b < end; ++b) {
      const int64_t left = job.rows - b * kBlockRows;
      const int64_t count = left < kBlockRows ? left : kBlockRows;
      typename S::F bias[Rows32<S>::kVectors];
      for (auto& v : bias) v = S::zero();
      if (job.bias != nullptr) {
        Rows32<S>::load({job.bias, 0, DType::f32}, 0, b * kBlockRows, count, bias);
      }
      for (int64_t first = 0; first < job.tile_count; first += tiles_at_once<Format>()) {
        const TokenTile* tiles = job.tiles + first;
        const int64_t rest = job.tile_count - first;
        const int n =
            static_cast<int>(rest < tiles_at_once<Format>() ? rest : tiles_at_once<Format>());
        multiply<S, Format>(*job.layout, job.weight + b * block, groups, tiles, n,
                            job.rounding.planes, encoded, c, job.prefetch);
        for (int i = 0; i < n; ++i) {
          const float* from =
              c + (tiles[i].first - tiles[0].first) * job.rounding.planes * kBlockRows;
          for (int32_t t = 0; t < tiles[i].tokens; ++t, from += kBlockRows) {
            typename S::F v[Rows32<S>::kVectors];
            for (int k = 0; k < Rows32<S>::kVectors; ++k) {
              v[k] = S::add(S::load(from + k * S::kLanes), bias[k]);
            }
            Rows32<S>::store(job.out, tiles[i].first + t, b * kBlockRows, count, v);
          }
        }
      }
    }
  });
}

}  // namespace ktcore::KTCORE_ISA
