// Pages of keys and values times rows of queries, in tiles of bf16: two of these stand for a number, the nearest and
// what it lacks, which float16 comes to exactly, and queries and powers to some 2^-19; all their products are added up.
#pragma once

namespace ktcore::KTCORE_ISA {

// Rows that tiles of 16 hold.
static constexpr int64_t tile_rows(int64_t rows) { return round_up(rows, 16); }

// Memory of a thread, for a tile of queries and one page.
template <class S, class E>
class PageTiles {
 public:
  static_assert(kPagePositions == kGroup && kAttentionRows % 32 == 0);

  PageTiles(const KvPages& pages, float* work)
      : pages_(pages),
        key_groups_(ceil_div(pages.key_size, kGroup)),
        value_groups_(ceil_div(pages.value_size, kGroup)),
        queries_(reinterpret_cast<uint8_t*>(work)),
        keys_(queries_ + 2 * kAttentionRows * key_groups_ * kRow),
        values_(keys_ + 2 * key_groups_ * kTileGroupBytes),
        powers_(values_ + 2 * value_groups_ * kTileGroupBytes) {}

  // q [rows][key_size]
  void load_queries(const float* q, int64_t rows) const {
    const int64_t size = pages_.key_size;
    for (int64_t r = 0; r < tile_rows(rows); ++r) {
      for (int64_t g = 0; g < key_groups_; ++g) {
        const int64_t left = size - g * kGroup;
        typename S::F v[kVectors];
        for (auto& each : v) each = S::zero();
        if (r < rows) {
          Rows32<S>::load({q + r * size, 0, DType::f32}, 0, g * kGroup,
                          left < kGroup ? left : kGroup, v);
        }
        store_row(v, queries_ + (g * tile_rows(rows) + r) * kRow, key_groups_ * tile_rows(rows));
      }
    }
  }

  // scores [rows][positions] of rows from `first` on, with the tiles these lie in; the next page's keys, `ahead`
  // elements on, are asked for. Returns for which of the first `count` positions that does not hold, as bits: those
  // with a key that is not finite.
  uint32_t score(const typename E::T* keys, int64_t ahead, int64_t count, int64_t first,
                 int64_t rows, float* scores) const {
    typename S::F spoiled[kVectors];
    for (auto& v : spoiled) v = S::zero();
    for (int64_t c = 0; c < key_groups_ * kGroup; c += 2) {
      uint8_t* to = keys_ + c / 2 * kUnitBytes;
      for (int v = 0; v < kVectors; ++v) {
        typename S::F pair[2];
        for (int i = 0; i < 2; ++i) {
          const typename E::T* from = keys + (c + i) * kPagePositions + v * S::kLanes;
          pair[i] = S::zero();
          if (c + i >= pages_.key_size) continue;
          S::prefetch(reinterpret_cast<const uint8_t*>(from + ahead));
          pair[i] = E::load(from);
          spoiled[v] = S::add(spoiled[v], S::sub(pair[i], pair[i]));
        }
        store_pair(pair[0], pair[1], to + v * S::kLanes * 4, key_groups_);
      }
    }
    const int64_t all = tile_rows(rows), groups = key_groups_;
    by_tiles(first, all, [&](int64_t at, int tiles) {
      const TileSums<S, false> sums(tiles, 16, all, queries_ + at * kRow,
                                    scores + at * kPagePositions, kPagePositions);
      sums.begin(false);
      multiply(sums, groups, keys_, groups);
      sums.end();
    });
    uint32_t bits = 0;
    for (int v = 0; v < kVectors; ++v) {
      alignas(64) float sum[S::kLanes];
      S::store(sum, spoiled[v]);
      for (int i = 0; i < S::kLanes; ++i) {
        const int at = v * S::kLanes + i;
        if (sum[i] != 0 && at < count) bits |= uint32_t{1} << at;
      }
    }
    return bits;
  }

  // Of a page's first `count` positions, those before the first with a value that is not finite.
  int64_t load_values(const typename E::T* values, int64_t ahead, int64_t count) const {
    for (int64_t p = 0; p < kPagePositions; p += 2) {
      typename S::F spoiled = S::zero();
      for (int64_t g = 0; g < value_groups_; ++g) {
        typename S::F pair[2][kVectors];
        for (int i = 0; i < 2; ++i) {
          for (auto& v : pair[i]) v = S::zero();
          if (p + i >= count) continue;
          const typename E::T* from = values + (p + i) * pages_.value_size;
          const int64_t left = pages_.value_size - g * kGroup;
          S::prefetch(reinterpret_cast<const uint8_t*>(from + g * kGroup + ahead));
          Rows32<S>::load({from, 0, pages_.dtype}, 0, g * kGroup, left < kGroup ? left : kGroup,
                          pair[i]);
          for (const auto& v : pair[i]) spoiled = S::add(spoiled, S::sub(v, v));
        }
        uint8_t* to = values_ + g * kTileGroupBytes + p / 2 * kUnitBytes;
        for (int v = 0; v < kVectors; ++v) {
          store_pair(pair[0][v], pair[1][v], to + v * S::kLanes * 4, value_groups_);
        }
      }
      if (S::sum(spoiled) == 0) continue;
      const int64_t whole = finite(values + p * pages_.value_size) ? p + 1 : p;
      load_values(values, 0, whole);
      return whole;
    }
    return count;
  }

  // acc [rows][stride] += powers [rows][positions] times the values that were loaded, for rows from `first` to `end`;
  // of each, its first seen(row) positions.
  template <class Seen>
  void mix(const float* scores, int64_t first, int64_t end, Seen&& seen, float* acc,
           int64_t stride) const {
    const int64_t from = first / 16 * 16, all = tile_rows(end);
    for (int64_t r = from; r < all; ++r) {
      const int64_t count = r < first || r >= end ? 0 : seen(r);
      const float* row = scores + r * kPagePositions;
      alignas(64) float part[kPagePositions] = {};
      if (count < kPagePositions) {
        std::memcpy(part, row, static_cast<size_t>(count) * sizeof(float));
        row = part;
      }
      typename S::F v[kVectors];
      for (int i = 0; i < kVectors; ++i) v[i] = S::load(row + i * S::kLanes);
      store_row(v, powers_ + r * kRow, kAttentionRows);
    }
    by_tiles(first, all, [&](int64_t at, int tiles) {
      for (int64_t g = 0; g < value_groups_; ++g) {
        const TileSums<S, false> sums(tiles, 16, kAttentionRows, powers_ + at * kRow,
                                      acc + at * stride + g * kGroup, stride);
        sums.begin(true);
        multiply(sums, 1, values_ + g * kTileGroupBytes, value_groups_);
        sums.end();
      }
    });
  }

 private:
  static constexpr int kVectors = Rows32<S>::kVectors;
  static constexpr int64_t kRow = TileCodec<S>::kGroupBytes;
  static constexpr bool kRest = E::kBf16s > 1;

  // Calls f(first row, how many tiles) for what holds all rows from `first` on.
  template <class F>
  static KT_INLINE void by_tiles(int64_t first, int64_t end, F&& f) {
    for (int64_t at = first / 16 * 16; at < end; at += 32) f(at, end - at < 32 ? 1 : 2);
  }

  // A row's 32 numbers, and `rows` rows on what their nearest bf16 lack.
  static KT_INLINE void store_row(const typename S::F (&v)[kVectors], uint8_t* to, int64_t rows) {
    for (int i = 0; i < kVectors; ++i) {
      auto* at = reinterpret_cast<uint16_t*>(to) + i * S::kLanes;
      const typename S::F near = S::nearest_bf16(v[i]);
      S::store_upper(at, near);
      S::store_bf16(at + rows * kGroup, S::sub(v[i], near));
    }
  }
  // Pairs of neighbours, and `groups` groups on what their nearest bf16 lack.
  static KT_INLINE void store_pair(typename S::F a, typename S::F b, uint8_t* to, int64_t groups) {
    if constexpr (!kRest) return S::store_i(to, S::upper_halves(a, b));
    const typename S::F a_near = S::nearest_bf16(a), b_near = S::nearest_bf16(b);
    S::store_i(to, S::upper_halves(a_near, b_near));
    S::store_i(to + groups * kTileGroupBytes,
               S::upper_halves(S::sub(a, a_near), S::sub(b, b_near)));
  }

  // Adds all products of `groups` groups: of rows what is nearest lies so many groups before what that lacks, of keys
  // or values `w_groups`.
  static KT_INLINE void multiply(const TileSums<S, false>& sums, int64_t groups, const uint8_t* w,
                                 int64_t w_groups) {
    Ahead<S> nothing{w, 0, 1};
    sums.add(0, groups, w, nothing);
    sums.add(groups, groups, w, nothing);
    if constexpr (!kRest) return;
    const uint8_t* rest = w + w_groups * kTileGroupBytes;
    sums.add(0, groups, rest, nothing);
    sums.add(groups, groups, rest, nothing);
  }

  bool finite(const typename E::T* values) const {
    for (int64_t c = 0; c < pages_.value_size; c += kGroup) {
      const int64_t left = pages_.value_size - c;
      typename S::F v[kVectors];
      Rows32<S>::load({values, 0, pages_.dtype}, 0, c, left < kGroup ? left : kGroup, v);
      for (const auto& each : v) {
        if (S::sum(S::sub(each, each)) != 0) return false;
      }
    }
    return true;
  }

  const KvPages& pages_;
  const int64_t key_groups_, value_groups_;
  uint8_t* const queries_;  // [nearest, rest][group][row][32]
  uint8_t* const keys_;     // [nearest, rest][group][pair of columns][position]
  uint8_t* const values_;   // [nearest, rest][group][pair of positions][32 columns]
  uint8_t* const powers_;   // [nearest, rest][row][position]
};

}  // namespace ktcore::KTCORE_ISA
