// moe: out[t] = sum over the token's experts e of weight * down_e (act(gate_e x_t) * up_e x_t), each
// matrix with its bias where it has one.
//
// Two passes over the pool, once the tokens are encoded: gate and up for every (portion of an expert's tokens, block of
// 32 intermediate rows), whose 32 activations are one encoded group of the next matrix and go straight into its tile;
// down for every range of output columns, summed over the experts in ascending order, so that the result depends
// neither on threads nor on the batch.
#pragma once

namespace ktcore::KTCORE_ISA {

// The biases of a block of rows; zeros without any. `listed`: which rows these are, null for those in
// their place.
template <class S>
static KT_INLINE void load_bias(const float* bias, const int32_t* listed, int64_t block,
                                int64_t rows, typename S::F* v) {
  if (bias == nullptr) {
    for (int k = 0; k < Rows32<S>::kVectors; ++k) v[k] = S::zero();
    return;
  }
  const int64_t left = rows - block * kBlockRows, count = left < kBlockRows ? left : kBlockRows;
  if (listed == nullptr) {
    Rows32<S>::load({bias, rows, DType::f32}, 0, block * kBlockRows, count, v);
  } else {
    Rows32<S>::load_listed({bias, rows, DType::f32}, 0, listed + block * kBlockRows, count, v);
  }
}

// The activations of a portion for gate and for up, encoded. Put into the thread's memory, unless that is what they
// are already: threads go on to the next portion once in a while.
struct PortionEncoded {
  EncodedTiles gate, up;
};
template <class S, class Format>
static KT_INLINE PortionEncoded portion_encoded(const MoeJob& job, int64_t number, int thread) {
  const Portion& portion = job.portion[number];
  const TokenTile* tiles = job.tiles + portion.first;
  const int planes = job.rounding.planes;
  const int64_t first = tiles->first, hidden = job.hidden_size;
  const int64_t token_bytes = token_bytes_of<Format>(planes, hidden);
  uint8_t* for_gate = job.portion_encoded + thread * job.portion_bytes;
  uint8_t* for_up = for_gate + job.portion_bytes / 2;
  const bool at_hand = job.at_hand[thread] == number;
  job.at_hand[thread] = number;
  if (!job.gate_up->reordered) {
    for (int i = 0; !at_hand && i < portion.count; ++i) {
      gather_tile<Format>(tiles[i], hidden, planes, job.tokens_encoded,
                          for_gate + (tiles[i].first - first) * token_bytes,
                          [&](int32_t pair) { return job.pair_token[pair]; });
    }
    const EncodedTiles both{for_gate, first, token_bytes, job.tokens_encoded, job.pair_token};
    return {both, both};
  }
  // Columns are in orders of their own.
  const ActiveExpert& expert = job.expert[portion.expert];
  for (int i = 0; !at_hand && i < portion.count; ++i) {
    const TokenTile& tile = tiles[i];
    const auto encode = [&](const int32_t* columns, uint8_t* encoded) {
      with_codec<Format>(tile.fine, [&](auto codec) {
        for (int32_t t = 0; t < tile.tokens; ++t) {
          encode_token<S, decltype(codec)>(
              job.x, job.pair_token[tile.first + t], hidden, columns, job.rounding,
              encoded + (tile.first - first) * token_bytes, tile.tokens * planes, t * planes);
        }
      });
    };
    encode(expert.gate_columns, for_gate);
    encode(expert.up_columns, for_up);
  }
  return {{for_gate, first, token_bytes}, {for_up, first, token_bytes}};
}

template <class S, class Format>
static void gate_up(const MoeJob& job, ThreadPool& pool) {
  const int64_t hidden = job.hidden_size, intermediate = job.intermediate_size;
  const int64_t hidden_groups = ceil_div(hidden, kGroup);
  const int64_t mid_groups = ceil_div(intermediate, kGroup);
  const int planes = job.rounding.planes;
  const int64_t in_block = job.gate_up->block_bytes(hidden);
  for (int i = 0; i < pool.size(); ++i) job.at_hand[i] = -1;

  // Run after run of blocks, so that each node's threads begin with what lies in its memory; portion after portion,
  // so that the next blocks find the activations in a cache.
  const int64_t up_step = blocks_per_task(2 * in_block);
  const auto tasks_of = [&](const BlockRun& run) { return ceil_div(run.end - run.first, up_step); };
  int64_t tasks = 0;
  for (int64_t i = 0; i < job.runs; ++i) tasks += job.portions * tasks_of(job.gate_up_runs[i]);
  parallel_for(pool, tasks, [&](int64_t task, int thread) {
    const BlockRun* run = job.gate_up_runs;
    for (; task >= job.portions * tasks_of(*run); ++run) task -= job.portions * tasks_of(*run);
    const int64_t number = task / tasks_of(*run);
    const PortionEncoded encoded = portion_encoded<S, Format>(job, number, thread);
    const Portion& portion = job.portion[number];
    const ActiveExpert& expert = job.expert[portion.expert];
    const TokenTile* tiles = job.tiles + portion.first;
    const int count = portion.count;
    const int64_t begin = run->first + task % tasks_of(*run) * up_step;
    const int64_t end = begin + up_step < run->end ? begin + up_step : run->end;
    alignas(64) float gate[kProductRows * kBlockRows];
    alignas(64) float up[kProductRows * kBlockRows];
    for (int64_t b = begin; b < end; ++b) {
      const uint8_t* weights = run->block(expert.number, b, 2 * in_block);
      typename S::F gate_bias[Rows32<S>::kVectors], up_bias[Rows32<S>::kVectors];
      load_bias<S>(expert.gate_bias, expert.down_columns, b, intermediate, gate_bias);
      load_bias<S>(expert.up_bias, expert.down_columns, b, intermediate, up_bias);
      multiply_alike<S, Format>(tiles->fine, *job.gate_up, weights, hidden_groups, tiles, count,
                                planes, encoded.gate, gate, job.gate_up_prefetch);
      multiply_alike<S, Format>(tiles->fine, *job.gate_up, weights + in_block, hidden_groups, tiles,
                                count, planes, encoded.up, up, job.gate_up_prefetch);
      for (int i = 0; i < count; ++i) {
        float* h = gate + (tiles[i].first - tiles[0].first) * planes * kBlockRows;
        const float* u = up + (h - gate);
        for (int32_t at = 0; at < tiles[i].tokens * kBlockRows; at += kBlockRows) {
          for (int v = 0; v < Rows32<S>::kVectors; ++v) {
            const int64_t k = at + v * S::kLanes;
            S::store(h + k, activate<S>(job.activation, S::add(S::load(h + k), gate_bias[v]),
                                        S::add(S::load(u + k), up_bias[v])));
          }
        }
        job.encode_mid(h, tiles[i].tokens, intermediate - b * kBlockRows, job.mid_rounding,
                       job.mid_encoded + tiles[i].first * job.mid_token_bytes, b, mid_groups);
      }
    }
  });
}

template <class S, class Format>
static void down(const MoeJob& job, ThreadPool& pool) {
  const int64_t hidden = job.hidden_size;
  const int64_t out_blocks = ceil_div(hidden, kBlockRows);
  const int64_t mid_groups = ceil_div(job.intermediate_size, kGroup);
  const int planes = job.mid_rounding.planes;
  const int64_t mid_block = job.down->block_bytes(job.intermediate_size);
  // With many tokens, wide ranges: each range reads all encoded intermediate activations once.
  int64_t down_step = blocks_per_task(mid_block * (job.experts > 0 ? job.experts : 1));
  const int64_t wide = out_blocks / (4 * pool.size()) < 8 ? out_blocks / (4 * pool.size()) : 8;
  if (down_step < wide) down_step = wide;
  parallel_for(pool, ceil_div(out_blocks, down_step), [&](int64_t task, int) {
    const int64_t begin = task * down_step;
    const int64_t end = begin + down_step < out_blocks ? begin + down_step : out_blocks;
    alignas(64) float c[kProductRows * kBlockRows];
    const EncodedTiles encoded{job.mid_encoded, 0, job.mid_token_bytes};
    // [block][token][32]: with a token's columns side by side, those of a block would lie a power of two apart, and share
    // few sets of a cache.
    const int64_t block_sums = job.tokens * kBlockRows;
    std::memset(job.sum + begin * block_sums, 0,
                static_cast<size_t>((end - begin) * block_sums) * sizeof(float));
    for (int64_t p = 0; p < job.portions; ++p) {
      const ActiveExpert& expert = job.expert[job.portion[p].expert];
      const TokenTile* tiles = job.tiles + job.portion[p].first;
      const int count = job.portion[p].count;
      for (int64_t b = begin; b < end; ++b) {
        multiply<S, Format>(*job.down, run_of(job.down_runs, b).block(expert.number, b, mid_block),
                            mid_groups, tiles, count, planes, encoded, c, job.down_prefetch);
        typename S::F bias[Rows32<S>::kVectors];
        load_bias<S>(expert.down_bias, nullptr, b, hidden, bias);
        for (int i = 0; i < count; ++i) {
          const float* from = c + (tiles[i].first - tiles[0].first) * planes * kBlockRows;
          for (int32_t t = 0; t < tiles[i].tokens; ++t, from += kBlockRows) {
            const int32_t pair = tiles[i].first + t;
            const typename S::F weight = S::set1(job.pair_weight[pair]);
            float* to = job.sum + b * block_sums + job.pair_token[pair] * kBlockRows;
            for (int k = 0; k < Rows32<S>::kVectors; ++k) {
              const int v = k * S::kLanes;
              const typename S::F y = S::add(S::load(from + v), bias[k]);
              S::store(to + v, S::fma(y, weight, S::load(to + v)));
            }
          }
        }
      }
    }
    for (int64_t t = 0; t < job.tokens; ++t) {
      for (int64_t b = begin; b < end; ++b) {
        typename S::F v[Rows32<S>::kVectors];
        for (int k = 0; k < Rows32<S>::kVectors; ++k) {
          v[k] = S::load(job.sum + b * block_sums + t * kBlockRows + k * S::kLanes);
        }
        const int64_t left = hidden - b * kBlockRows;
        Rows32<S>::store(job.out, t, b * kBlockRows, left < kBlockRows ? left : kBlockRows, v);
      }
    }
  });
}

}  // namespace ktcore::KTCORE_ISA
