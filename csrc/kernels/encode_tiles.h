// From token rows to encoded tiles: what `moe` and `linear` do before they touch a weight.
#pragma once

namespace ktcore::KTCORE_ISA {

// Encodes a token as rows [row, row + rounding.planes) of a tile of `rows`; its columns in the order listed, if
// there is a list. The codec adds to `loss`, if it is given.
template <class S, class Codec, class... Loss>
static void encode_token(const ConstRows& x, int64_t token, int64_t cols, const int32_t* columns,
                         Rounding rounding, uint8_t* tile, int64_t rows, int64_t row,
                         Loss&... loss) {
  const int64_t groups = ceil_div(cols, kGroup);
  const auto load = [&](int64_t g, typename S::F* v) {
    const int64_t left = cols - g * kGroup, count = left < kGroup ? left : kGroup;
    if (columns == nullptr) {
      Rows32<S>::load(x, token, g * kGroup, count, v);
    } else {
      Rows32<S>::load_listed(x, token, columns + g * kGroup, count, v);
    }
    return count;
  };
  if constexpr (requires { Codec::kPieceGroups; }) {
    for (int64_t first = 0; first < groups; first += Codec::kPieceGroups) {
      const int64_t left = groups - first;
      const int64_t count = left < Codec::kPieceGroups ? left : Codec::kPieceGroups;
      typename S::F v[Codec::kPieceGroups][Rows32<S>::kVectors];
      for (int64_t g = 0; g < count; ++g) load(first + g, v[g]);
      Codec::encode(v, count, cols - first * kGroup, rounding, tile, rows, row, first, groups,
                    loss...);
    }
  } else {
    for (int64_t g = 0; g < groups; ++g) {
      typename S::F v[Rows32<S>::kVectors];
      const int64_t count = load(g, v);
      Codec::encode(v, count, rounding, tile, rows, row, g, groups, loss...);
    }
  }
}

// Encodes 32 columns of the tokens of a tile, [tokens][32], as group number `group` of it; `count` columns are left.
template <class S, class Codec>
static void encode_columns(const float* columns, int64_t tokens, int64_t count, Rounding rounding,
                           uint8_t* tile, int64_t group, int64_t groups) {
  const int planes = rounding.planes;
  for (int64_t t = 0; t < tokens; ++t, columns += kBlockRows) {
    typename S::F v[Rows32<S>::kVectors];
    for (int k = 0; k < Rows32<S>::kVectors; ++k) v[k] = S::load(columns + k * S::kLanes);
    Codec::encode(v, count, rounding, tile, tokens * planes, t * planes, group, groups);
  }
}

// The largest number of a token, its sign left out; NaN if one of them is.
template <class S>
static float largest_of(const ConstRows& x, int64_t token, int64_t cols) {
  float largest = 0;
  for (int64_t at = 0; at < cols; at += kGroup) {
    typename S::F v[Rows32<S>::kVectors];
    Rows32<S>::load(x, token, at, cols - at < kGroup ? cols - at : kGroup, v);
    const float here = S::absmax32(v);
    if (here > largest || here != here) largest = here;  // nothing is larger than NaN
  }
  return largest;
}

// A token's activations take as many bytes of memory either way.
template <class Format>
static constexpr int64_t token_bytes_of(int planes, int64_t cols) {
  const int64_t bytes = Format::Codec::row_bytes(cols), fine = Format::Fine::Codec::row_bytes(cols);
  return planes * (bytes > fine ? bytes : fine);
}

// Calls f with a value of the codec that is for fine tokens, or for others.
template <class Format, class F>
static KT_INLINE void with_codec(bool fine, F&& f) {
  if constexpr (std::is_same_v<typename Format::Fine, Format>) {
    f(typename Format::Codec());
  } else if (fine) {
    f(typename Format::Fine::Codec());
  } else {
    f(typename Format::Codec());
  }
}

// Encodes a token on its own, and says whether it is fine: whether its numbers have to be taken more finely
// than the format's codec takes them.
template <class S, class Format>
static KT_INLINE bool encode_alone(const EncodeJob& job, int64_t token, uint8_t* out) {
  const int planes = job.rounding.planes;
  const auto encode = [&](auto codec, auto&... loss) {
    encode_token<S, decltype(codec)>(job.x, token, job.cols, job.columns, job.rounding, out, planes,
                                     0, loss...);
  };
  if constexpr (std::is_same_v<typename Format::Fine, Format>) {
    encode(typename Format::Codec());
    return false;
  } else {
    typename Format::Codec::Loss loss;
    encode(typename Format::Codec(), loss);
    if (!loss.known()) {
      const float largest = largest_of<S>(job.x, token, job.cols);
      if (!(largest >= 1e-30f && largest <= 3.4028235e38f)) return false;  // nothing to lose
      loss = {1 / largest};
      encode(typename Format::Codec(), loss);
    }
    if (!loss.much()) return false;
    encode(typename Format::Fine::Codec());
    return true;
  }
}

template <class S, class Format>
static void encode_tokens(const EncodeJob& job, ThreadPool& pool) {
  const int64_t token_bytes = token_bytes_of<Format>(job.rounding.planes, job.cols);
  // A few microseconds a task; one token is done where it is.
  const int64_t per_task = ceil_div(16384, job.cols), tokens = job.tokens;
  parallel_for(pool, ceil_div(tokens, per_task), [&](int64_t task, int) {
    const int64_t end = task * per_task + per_task < tokens ? task * per_task + per_task : tokens;
    for (int64_t t = task * per_task; t < end; ++t) {
      const bool fine = encode_alone<S, Format>(job, t, job.encoded + t * token_bytes);
      if (job.fine != nullptr) job.fine[t] = fine;
    }
  });
}

// Interleaves the tokens of a tile of more than one; `token_of(i)` is the token of pair i.
template <class Format, class TokenOf>
static KT_INLINE void gather_tile(const TokenTile& tile, int64_t cols, int planes,
                                  const uint8_t* encoded, uint8_t* out, TokenOf token_of) {
  if (tile.tokens == 1) return;
  const int64_t groups = ceil_div(cols, kGroup);
  const int64_t token_bytes = token_bytes_of<Format>(planes, cols);
  with_codec<Format>(tile.fine, [&](auto codec) {
    for (int32_t t = 0; t < tile.tokens; ++t) {
      decltype(codec)::gather(encoded + token_of(tile.first + t) * token_bytes, planes, out,
                              tile.tokens * planes, t * planes, groups);
    }
  });
}

// Blocks per task, so that a task reads at least about 32 KiB of weights.
static KT_INLINE int64_t blocks_per_task(int64_t block_bytes) {
  return ceil_div(32768, block_bytes);
}

}  // namespace ktcore::KTCORE_ISA
