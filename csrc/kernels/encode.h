// Activations as the dot products take them.
//
// An encoded tile holds R rows, interleaved so that the values that one step of the kernel
// broadcasts lie side by side. An encoded token is the tile of that token alone.
#pragma once

namespace ktcore::KTCORE_ISA {

// Copies rows of 4-byte (or Bytes-byte) items from a tile of `count` rows to rows [row, row + count)
// of a tile of `rows`.
template <int64_t Bytes>
static KT_INLINE void copy_rows(const uint8_t* from, int count, uint8_t* to, int64_t rows,
                                int64_t row, int64_t items) {
  for (int64_t i = 0; i < items; ++i) {
    for (int p = 0; p < count; ++p) {
      std::memcpy(to + (i * rows + row + p) * Bytes, from + (i * count + p) * Bytes, Bytes);
    }
  }
}

// 16-bit integers, or of fewer bits where a layout allows no larger ones, with one scale per group of 32:
// they leave 0.003 % of error.
//
// Four columns at a time are two items of four bytes, as Quads (formats/quads.h) takes them:
// item[K/2][R]; scale[K/32][R] f32; sum[K/16][R] i32, of 16 columns' integers each, which undo the
// weights' bias; value[K/16][R] f32, what these sums stand for, which the weights' offsets multiply.
//
// With kPairs, in the order that floats' columns have in memory.
template <class S, bool kPairs = false>
struct Int16Codec {
  using F = typename S::F;
  static constexpr int kVectors = Rows32<S>::kVectors;
  static constexpr int64_t kItemBytes = 2 * kGroup;  // of a group

  static constexpr int64_t row_bytes(int64_t cols) {
    return ceil_div(cols, kGroup) * (kItemBytes + 20);
  }
  static const float* scales(const uint8_t* tile, int64_t rows, int64_t groups) {
    return reinterpret_cast<const float*>(tile + rows * groups * kGroup * 2);
  }
  static const int32_t* sums(const uint8_t* tile, int64_t rows, int64_t groups) {
    return reinterpret_cast<const int32_t*>(scales(tile, rows, groups) + rows * groups);
  }
  static const float* values(const uint8_t* tile, int64_t rows, int64_t groups) {
    return reinterpret_cast<const float*>(sums(tile, rows, groups) + 2 * rows * groups);
  }

  static KT_INLINE void encode(const F* v, int64_t, Rounding rounding, uint8_t* tile, int64_t rows,
                               int64_t row, int64_t group, int64_t groups) {
    const float amax = S::absmax32(v);
    // Below this the reciprocal overflows: such a group is zero for every practical purpose.
    const bool tiny = amax < 1e-30f;
    // An infinite or NaN value makes the whole token NaN, as the exact sum of products would be.
    const bool finite = amax <= 3.4028235e38f;
    const auto largest = static_cast<float>(rounding.largest);
    alignas(64) uint8_t items[2 * kGroup];
    int32_t sum[2];
    const ItemOrder order = kPairs                ? ItemOrder::pairs
                            : rows > S::kByteRows ? ItemOrder::words
                                                  : ItemOrder::bytes;
    S::encode16(v, S::set1(finite && !tiny ? largest / amax : 0.0f), order, items, sum);
    for (int64_t i = 0; i < kGroup / 2; ++i) {
      std::memcpy(tile + ((group * (kGroup / 2) + i) * rows + row) * 4, items + 4 * i, 4);
    }
    const float scale = !finite ? std::numeric_limits<float>::quiet_NaN()
                        : tiny  ? 0.0f
                                : amax / largest;
    const_cast<float*>(scales(tile, rows, groups))[group * rows + row] = scale;
    const int64_t at = 2 * group * rows + row;
    auto* sums_at = const_cast<int32_t*>(sums(tile, rows, groups)) + at;
    auto* values_at = const_cast<float*>(values(tile, rows, groups)) + at;
    for (int i = 0; i < 2; ++i) {
      sums_at[i * rows] = finite ? sum[i] : 0;
      values_at[i * rows] = scale * static_cast<float>(sums_at[i * rows]);
    }
  }

  static KT_INLINE void gather(const uint8_t* token, int, uint8_t* tile, int64_t rows, int64_t row,
                               int64_t groups) {
    const int64_t items = groups * (kGroup / 2);
    if constexpr (S::kByteRows > 0 && !kPairs) {
      if (rows > S::kByteRows) {
        for (int64_t g = 0; g < groups; ++g) {
          alignas(64) uint8_t words[2 * kGroup];
          for (int64_t at = 0; at < 2 * kGroup; at += S::kLanes * 4) {
            S::store_i(words + at, words_of_bytes(S::load_i(token + g * 2 * kGroup + at)));
          }
          copy_rows<4>(words, 1, tile + g * 2 * kGroup * rows, rows, row, kGroup / 2);
        }
        copy_rows<4>(token + items * 4, 1, tile + items * 4 * rows, rows, row, groups * 5);
        return;
      }
    }
    copy_rows<4>(token, 1, tile, rows, row, items + groups * 5);
  }

 private:
  // Items of ByteQuads as those of WordQuads.
  static KT_INLINE typename S::I words_of_bytes(typename S::I items) {
    static constexpr int8_t kUpper[16] = {-1, 0, -1, 2, -1, 1, -1, 3, -1, 8, -1, 10, -1, 9, -1, 11};
    static constexpr int8_t kLower[16] = {-1, 4,  -1, 6,  -1, 5,  -1, 7,
                                          -1, 12, -1, 14, -1, 13, -1, 15};
    const typename S::I upper = S::look_up(items, S::table16(kUpper));
    const typename S::I lower = S::look_up(items, S::table16(kLower));
    return S::add_i16(upper, S::odd_bytes(lower));
  }
};

// Between which numbers the first and the last 16 of 32 columns lie, of which the first `count` are the token's:
// those within `radius` of `centre`.
template <class S>
struct Spread {
  float radius[2], centre[2];

  KT_INLINE Spread(const typename S::F* v, int64_t count) {
    float most[2], minus_least[2];
    S::halves(v, most, minus_least);
    for (int half = 0; half < 2; ++half) {
      // Where others share 16 columns with the token's, there is no centre: zeros, which the weights there
      // may not be, have to come out as zeros.
      const bool whole = count >= (half + 1) * (kGroup / 2);
      const float larger = most[half] > minus_least[half] ? most[half] : minus_least[half];
      // (Halves, as the sum of the two may be infinite.)
      radius[half] = whole ? 0.5f * most[half] + 0.5f * minus_least[half] : larger * (126.5f / 127);
      centre[half] = whole ? 0.5f * most[half] - 0.5f * minus_least[half] : 0.0f;
    }
  }
};

// 32 columns as bytes: in each half, an activation is scale * n + centre.
template <class S>
struct ByteValues {
  using F = typename S::F;
  static constexpr int kVectors = static_cast<int>(kGroup / 2) / S::kLanes;  // of 16 columns
  F n[2 * kVectors];
  float scale[2], centre[2];

  // `steps` is one over the scale, or zero.
  KT_INLINE void round(const F* v, int half, float steps) {
    for (int i = half * kVectors; i < (half + 1) * kVectors; ++i) {
      n[i] = S::round(S::mul(S::sub(v[i], S::set1(centre[half])), S::set1(steps)));
    }
  }
  // Writes the bytes, and their sums in each half.
  KT_INLINE void store(int8_t* q, int32_t* sum) const {
    const __m256i bytes = S::quantize32(n, S::set1(1));
    byte_sums(bytes, sum);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), bytes);
  }
};

static KT_INLINE int32_t nearest(float v) {
  return static_cast<int32_t>(v + (v < 0 ? -0.5f : 0.5f));
}

// How much of a token bytes lose: the squares of its numbers, times a factor, and of what is left out of them.
template <class S>
struct ByteLoss {
  using F = typename S::F;
  float factor = 1;
  F all = S::zero(), lost = S::zero();

  KT_INLINE void add(const F* v, const ByteValues<S>& bytes) {
    for (int i = 0; i < 2 * ByteValues<S>::kVectors; ++i) {
      const int half = i / ByteValues<S>::kVectors;
      const F from_centre = S::sub(v[i], S::set1(bytes.centre[half]));
      const F rest = S::fma(bytes.n[i], S::set1(-bytes.scale[half]), from_centre);
      const F value = S::mul(v[i], S::set1(factor)), left = S::mul(rest, S::set1(factor));
      all = S::fma(value, value, all);
      lost = S::fma(left, left, lost);
    }
  }
  // More than 0.55 % of the token, as a few numbers that are far larger than all others may make of those
  // near them: `moe` makes 0.76 of it.
  KT_INLINE bool much() const { return S::sum(lost) > 0.0055f * 0.0055f * S::sum(all); }
  // Whether no square was too large or too small to tell.
  KT_INLINE bool known() const { return S::sum(all) >= 1e-24f && S::sum(all) <= 1e36f; }
};

// Signed bytes, with a scale and a centre for each 16 columns: an activation is scale * q + centre. With 16
// columns and a centre between their smallest and their largest, `linear` loses 0.4 % (docs/design.md). A
// centre is a multiple of its scale, so that zeros are exact, and numbers near zero beside a large one are
// not all off by the same.
//
// item[K/4][R] of four q; scale[K/16][R] f32; start[K/16][R] i32, the sum of 16 q times minus the bias of
// unsigned bytes that stand for weights; value[3 K/32][R] f32, of 16, 16 and all 32 columns' scale * q, which
// the weights' offsets multiply; centre[K/16][R] f32.
template <class S>
struct ByteCodec {
  using F = typename S::F;
  using Loss = ByteLoss<S>;
  static constexpr int64_t kWords = kGroup / 4 + 9;  // of a group

  static constexpr int64_t row_bytes(int64_t cols) { return ceil_div(cols, kGroup) * kWords * 4; }

  // The token adds to `loss`, if it is given.
  template <class... Losses>
  static KT_INLINE void encode(const F* v, int64_t count, Rounding rounding, uint8_t* tile,
                               int64_t rows, int64_t row, int64_t group, int64_t groups,
                               Losses&... loss) {
    ByteValues<S> bytes = bytes_of(v, count);
    (loss.add(v, bytes), ...);
    const auto word = [&](int64_t before, int64_t size, int64_t i) {
      return tile + ((groups * before + group * size + i) * rows + row) * 4;
    };
    alignas(64) int8_t q[kGroup];
    int32_t sum[2];
    bytes.store(q, sum);
    // An infinite or NaN value makes the whole token NaN, as the exact sum of products would be.
    if (!(S::absmax32(v) <= 3.4028235e38f)) {
      for (int half = 0; half < 2; ++half) {
        bytes.scale[half] = std::numeric_limits<float>::quiet_NaN();
        bytes.centre[half] = 0;
        sum[half] = 0;
      }
      std::memset(q, 0, sizeof(q));
    }
    for (int64_t i = 0; i < kGroup / 4; ++i) std::memcpy(word(0, 8, i), q + 4 * i, 4);
    float value[3] = {};
    for (int half = 0; half < 2; ++half) {
      value[half] = bytes.scale[half] * static_cast<float>(sum[half]);
      value[2] += value[half];
      const int32_t start = -rounding.byte_bias * sum[half];
      std::memcpy(word(8, 2, half), &bytes.scale[half], 4);
      std::memcpy(word(10, 2, half), &start, 4);
      std::memcpy(word(15, 2, half), &bytes.centre[half], 4);
    }
    for (int i = 0; i < 3; ++i) std::memcpy(word(12, 3, i), &value[i], 4);
  }

  static KT_INLINE void gather(const uint8_t* token, int, uint8_t* tile, int64_t rows, int64_t row,
                               int64_t groups) {
    copy_rows<4>(token, 1, tile, rows, row, groups * kWords);
  }

 private:
  static KT_INLINE ByteValues<S> bytes_of(const F* v, int64_t count) {
    const Spread<S> spread(v, count);
    ByteValues<S> bytes;
    for (int half = 0; half < 2; ++half) {
      const float radius = spread.radius[half];
      // Below this the reciprocal overflows: such columns are their centre for every practical purpose.
      const float steps = radius >= 1e-30f ? 126.5f / radius : 0.0f;
      bytes.scale[half] = steps > 0 ? radius * (1 / 126.5f) : 0.0f;
      bytes.centre[half] = spread.centre[half];
      const float multiple = spread.centre[half] * steps;
      if (steps > 0 && multiple < 1e6f && multiple > -1e6f) {
        bytes.centre[half] = bytes.scale[half] * static_cast<float>(nearest(multiple));
      }
      bytes.round(v, half, steps);
    }
    return bytes;
  }
};

// The same where the sums of 16 products fit in 16 bits: the scales of a piece of the columns are multiples of
// one unit, scale = factor * unit, so that sums are scaled and added up as integers. Both a factor and a centre in
// units are 16 bits.
//
// item[K/4][R] of four q; factor[K/16][R], in the lower half of 32 bits or, where pairs of columns are summed in 16
// bits, in both; start[K/16][R] i32 as above, or for these pairs times the factor; centre[K/32][R], two i16, in units;
// value[K/32][R] f32, of 32 columns, in units, which the weights' offsets multiply; unit[K/512][R] f32.
//
// For weights with scales of their own for 16 columns (kSets = 2), which multiply the factors, these are smaller; there is
// a value of each 16 columns; and a start is not multiplied by the factor.
template <class S, int kSets>
struct ShortCodec {
  using F = typename S::F;
  using Loss = ByteLoss<S>;
  static constexpr int kVectors = Rows32<S>::kVectors;
  static constexpr int64_t kPieceGroups = 16;                // that share a unit
  static constexpr int64_t kWords = kGroup / 4 + 5 + kSets;  // of a group
  // As a centre is rounded to a multiple of its scale, it may grow by half of the largest factor. With such factors
  // the integer sums of a whole piece fit in 32 bits: 32 * 16 * 127 * 16 * 1001, and what centres add.
  // With two sets, a factor times an inner scale fits in 16 bits: 255 * 128.
  static constexpr float kLargestCentre = 32000, kLargestFactor = kSets == 2 ? 254 : 1000;

  static constexpr int64_t row_bytes(int64_t cols) {
    const int64_t groups = ceil_div(cols, kGroup);
    return (groups * kWords + ceil_div(groups, kPieceGroups)) * 4;
  }

  // Groups [first, first + count) of a token, the next piece; `left` columns are left.
  template <class... Losses>
  static KT_INLINE void encode(const F (*v)[kVectors], int64_t count, int64_t left,
                               Rounding rounding, uint8_t* tile, int64_t rows, int64_t row,
                               int64_t first, int64_t groups, Losses&... loss) {
    // Of the halves, of which there are as many as a group has columns.
    static_assert(2 * kPieceGroups == kGroup);
    alignas(64) float radius[kGroup] = {}, centre[kGroup] = {}, factor[kGroup], steps[kGroup];
    F not_finite = S::zero();  // NaN if a number is not
    for (int64_t g = 0; g < count; ++g) {
      const Spread<S> spread(v[g], left - g * kGroup);
      for (int half = 0; half < 2; ++half) {
        radius[2 * g + half] = spread.radius[half];
        centre[2 * g + half] = spread.centre[half];
      }
      for (F each : v[g]) not_finite = S::fma(each, S::zero(), not_finite);
    }
    const bool finite = S::sum(not_finite) == 0;
    F radii[kVectors], centres[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      radii[i] = finite ? S::load(radius + i * S::kLanes) : S::zero();
      centres[i] = finite ? S::load(centre + i * S::kLanes) : S::zero();
    }
    const float of_centres = S::absmax32(centres) * (1 / kLargestCentre);
    const float of_scales = S::absmax32(radii) * (1 / (126.5f * kLargestFactor));
    float unit = of_centres > of_scales ? of_centres : of_scales;
    // Below this the reciprocal overflows: such columns are zero for every practical purpose.
    if (unit < 1e-36f) unit = 0;
    const float units = unit > 0 ? 1 / unit : 0.0f;
    for (int i = 0; i < kVectors; ++i) {
      const F least = S::mul(radii[i], S::set1(units * (1 / 126.5f)));
      const F whole = S::max(S::round(S::add(least, S::set1(0.5f))), S::set1(1));
      const F inverse = S::div(S::set1(units), whole);
      S::store(factor + i * S::kLanes, whole);
      S::store(steps + i * S::kLanes, inverse);
      S::store(centre + i * S::kLanes, S::mul(whole, S::round(S::mul(centres[i], inverse))));
    }
    for (int64_t g = 0; g < count; ++g) {
      const auto word = [&](int64_t before, int64_t size, int64_t i) {
        return tile + ((groups * before + (first + g) * size + i) * rows + row) * 4;
      };
      ByteValues<S> bytes;
      for (int half = 0; half < 2; ++half) {
        const int64_t at = 2 * g + half;
        bytes.scale[half] = unit * factor[at];
        bytes.centre[half] = unit * centre[at];
        bytes.round(v[g], half, steps[at]);
      }
      (loss.add(v[g], bytes), ...);
      alignas(64) int8_t q[kGroup];
      int32_t sum[2], value[2];
      bytes.store(q, sum);
      for (int64_t i = 0; i < kGroup / 4; ++i) std::memcpy(word(0, 8, i), q + 4 * i, 4);
      for (int half = 0; half < 2; ++half) {
        const auto of_half = static_cast<int32_t>(factor[2 * g + half]);
        const int32_t stored = of_half * (S::kByteDots ? 1 : 0x10001);
        const int32_t start =
            -rounding.byte_bias * sum[half] * (S::kByteDots || kSets == 2 ? 1 : of_half);
        const auto units_of_centre = static_cast<int16_t>(centre[2 * g + half]);
        std::memcpy(word(8, 2, half), &stored, 4);
        std::memcpy(word(10, 2, half), &start, 4);
        std::memcpy(word(12, 1, 0) + 2 * half, &units_of_centre, 2);
        value[half] = of_half * sum[half] + static_cast<int32_t>(kGroup / 2) * units_of_centre;
      }
      if constexpr (kSets == 1) value[0] += value[1];
      for (int set = 0; set < kSets; ++set) {
        const auto stored = static_cast<float>(value[set]);
        std::memcpy(word(13, kSets, set), &stored, 4);
      }
    }
    // An infinite or NaN value makes the whole token NaN, as the exact sum of products would be.
    if (!finite) unit = std::numeric_limits<float>::quiet_NaN();
    std::memcpy(tile + ((groups * kWords + first / kPieceGroups) * rows + row) * 4, &unit, 4);
  }

  static KT_INLINE void gather(const uint8_t* token, int, uint8_t* tile, int64_t rows, int64_t row,
                               int64_t groups) {
    copy_rows<4>(token, 1, tile, rows, row, row_bytes(groups * kGroup) / 4);
  }
};

// Pairs of floats, for fused multiply-adds: exact. Tile: pair[K/2][R] of float[2].
template <class S>
struct FloatCodec {
  using F = typename S::F;
  static constexpr int kVectors = Rows32<S>::kVectors;
  static constexpr int64_t kPairBytes = 8, kItemBytes = kGroup / 2 * kPairBytes;  // of a group

  static constexpr int64_t row_bytes(int64_t cols) { return ceil_div(cols, kGroup) * kItemBytes; }

  static KT_INLINE void encode(const F* v, int64_t, Rounding, uint8_t* tile, int64_t rows,
                               int64_t row, int64_t group, int64_t) {
    alignas(64) float values[kGroup];
    for (int i = 0; i < kVectors; ++i) S::store(values + i * S::kLanes, v[i]);
    for (int64_t i = 0; i < kGroup / 2; ++i) {
      std::memcpy(tile + ((group * (kGroup / 2) + i) * rows + row) * kPairBytes, values + 2 * i,
                  kPairBytes);
    }
  }

  static KT_INLINE void gather(const uint8_t* token, int, uint8_t* tile, int64_t rows, int64_t row,
                               int64_t groups) {
    copy_rows<kPairBytes>(token, 1, tile, rows, row, groups * (kGroup / 2));
  }
};

// Pairs of bf16, for dot-product instructions. A token takes one row per plane: the first is the
// value rounded to bf16 (0.2 % of a Gaussian row), the next what that left over. Tile: pair[K/2][R].
template <class S>
struct Bf16Codec {
  using F = typename S::F;
  static constexpr int kVectors = Rows32<S>::kVectors;
  static constexpr int64_t kPairBytes = 4;

  static constexpr int64_t row_bytes(int64_t cols) {
    return ceil_div(cols, kGroup) * kGroup / 2 * kPairBytes;
  }

  static KT_INLINE void encode(const F* values, int64_t, Rounding rounding, uint8_t* tile,
                               int64_t rows, int64_t row, int64_t group, int64_t) {
    constexpr int64_t kPairs = kGroup / 2;
    alignas(64) uint16_t bf16[kGroup];
    F v[kVectors];
    for (int i = 0; i < kVectors; ++i) v[i] = values[i];
    const int planes = rounding.planes;
    for (int plane = 0; plane < planes; ++plane, ++row) {
      for (int i = 0; i < kVectors; ++i) S::store_bf16(bf16 + i * S::kLanes, v[i]);
      if (plane + 1 < planes) {
        for (int i = 0; i < kVectors; ++i) v[i] = S::sub(v[i], S::load_bf16(bf16 + i * S::kLanes));
      }
      for (int64_t i = 0; i < kPairs; ++i) {
        std::memcpy(tile + ((group * kPairs + i) * rows + row) * kPairBytes, bf16 + 2 * i,
                    kPairBytes);
      }
    }
  }

  static KT_INLINE void gather(const uint8_t* token, int planes, uint8_t* tile, int64_t rows,
                               int64_t row, int64_t groups) {
    copy_rows<kPairBytes>(token, planes, tile, rows, row, groups * (kGroup / 2));
  }
};

// Where the encoded activations of tiles are: those of one token in `tokens`, by the token's number,
// where there is such; all others in `tiles`, which begin with those of pair number `first`.
struct EncodedTiles {
  const uint8_t* tiles;
  int64_t first, token_bytes;
  const uint8_t* tokens = nullptr;
  const int32_t* token_of = nullptr;  // null: pairs are tokens

  KT_INLINE const uint8_t* operator()(const TokenTile& tile) const {
    if (tokens == nullptr || tile.tokens > 1) return tiles + (tile.first - first) * token_bytes;
    return tokens + (token_of == nullptr ? tile.first : token_of[tile.first]) * token_bytes;
  }
};

}  // namespace ktcore::KTCORE_ISA
