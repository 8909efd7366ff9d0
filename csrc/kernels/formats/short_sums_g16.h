// Weights of two and three bits with inner scales for 16 columns, times activations of eight: as in short_sums.h, but
// what multiplies a sum of 16 products is the activations' factor times the inner scale, and what multiplies the
// centres are the weights' sums times theirs. Of the scales the outer ones alone are floats.
#pragma once

namespace ktcore::KTCORE_ISA {

// Adds the sums of products of 16 columns, times the activations' factors and inner scales, which are in both halves of
// a lane where sums are.
template <class S, int V, int R>
static KT_INLINE void add_scaled_sums(typename S::I (&total)[V][R],
                                      const typename S::I (&sum)[V][R],
                                      const typename S::I (&inner)[V], const ShortTile<S, R, 2>& x,
                                      int half) {
  KT_UNROLL
  for (int r = 0; r < R; ++r) {
    const typename S::I factor = S::broadcast4(x.factors + (half * R + r) * 4);
    typename S::I start;
    if constexpr (!S::kByteDots) start = S::set1_i32(x.starts[half * R + r] & 0xffff);
    KT_UNROLL
    for (int v = 0; v < V; ++v) {
      typename S::I products = sum[v][r];
      if constexpr (!S::kByteDots) products = S::add_i16(products, start);
      total[v][r] = S::dot_i16(total[v][r], products, S::mul_i16(inner[v], factor));
    }
  }
}

// Adds sums, times a number for each row of weights.
template <class S, int V, int R>
static KT_INLINE void add_multiples(typename S::F (&piece)[V][R], const typename S::F (&sum)[V][R],
                                    const typename S::F (&factor)[V]) {
  KT_UNROLL
  for (int v = 0; v < V; ++v) {
    KT_UNROLL
    for (int r = 0; r < R; ++r) piece[v][r] = add_product<S>(piece[v][r], sum[v][r], factor[v]);
  }
}

// As many groups as fit in 32 bits: 2 * 32 * 4 * 128 * (255 * 127 + 32000 + 128).
static constexpr int64_t kSummedGroups = 2;

// A piece of a block's columns.
template <class S, int kBits>
struct ShortPanelG16 {
  using F = typename S::F;
  using I = typename S::I;
  static constexpr int64_t kGroups = ShortCodec<S, 2>::kPieceGroups;
  alignas(64) uint8_t weights[kGroups * 8 * kUnitBytes];    // [quad][32 rows][4 columns]
  alignas(64) uint8_t inner[kGroups * 2 * kBlockRows * 4];  // [group][half][32 rows] i32
  alignas(64) uint8_t sums[kGroups * kBlockRows * 4];  // [group][32 rows][half] i16, of weights
  alignas(64) float inner_offsets[kGroups * 2 * kBlockRows];  // [group][half][32 rows]
  alignas(64) float scales[kGroups * kBlockRows];             // [group][32 rows]
  alignas(64) float offsets[kGroups * kBlockRows];            // where has_offsets
  bool ends[kGroups];  // whether a group's outer scale is not the next one's
  bool has_offsets = false;

  // Adds a tile times the piece that was expanded to `out` [R][32].
  template <int R>
  KT_NOINLINE void dot(const Range& range, const uint8_t* tile, float* out,
                       const Ahead<S>& ahead) const {
    Ahead<S> coming = ahead;
    constexpr int V = vectors_at_once<S>(R, S::kIntCells);
    for (int v0 = 0; v0 < static_cast<int>(kBlockRows) / S::kLanes; v0 += V) {
      const int64_t row = v0 * S::kLanes;
      ShortTile<S, R, 2> x(tile, range.groups, range.first);
      F piece[V][R];
      I total[V][R];
      clear_sums<S>(piece);
      clear_sums<S>(total);
      int64_t first = 0;  // of the groups that share an outer scale
      for (int64_t g = 0; g < range.count; ++g, x.next()) {
        if (v0 == 0) coming.step();
        I of_weights[V], sum[V][R], inner_scales[V];
        load_lanes<S>(of_weights, sums, g, row);
        add_pairs<S>(total, of_weights, x.centres);
        KT_UNROLL
        for (int half = 0; half < 2; ++half) {
          sum_half<S, kBits>(sum, weights + 8 * g * kUnitBytes + row * 4, x, half);
          load_lanes<S>(inner_scales, inner, 2 * g + half, row);
          add_scaled_sums<S>(total, sum, inner_scales, x, half);
        }
        if (ends[g] || (range.first + g + 1) % kSummedGroups == 0) {
          F scale[V];
          load_set<S>(scale, scales, g, row);
          add_scaled<S>(piece, total, scale);
        }
        if (!ends[g]) continue;
        if (has_offsets) {
          F offset[V], of_offsets[V][R];
          clear_sums<S>(of_offsets);
          const float* values = x.values - (g - first) * 2 * R;
          for (int64_t set = 2 * first; set < 2 * g + 2; ++set, values += R) {
            load_set<S>(offset, inner_offsets, set, row);
            add_products<S, V, R>(of_offsets, offset, values);
          }
          load_set<S>(offset, offsets, g, row);
          add_multiples<S>(piece, of_offsets, offset);
        }
        first = g + 1;
      }
      add_units<S>(piece, x.units, range.first == 0, out, v0);
    }
  }
};

// Weights as in Coded (int16.h), with two sets of inner scales a group.
template <class S, int kBits>
struct ShortCodedG16 {
  using Fine = Coded<S, Codes<S, kBits, false>, 2>;
  using Codec = ShortCodec<S, 2>;
  using Panel = ShortPanelG16<S, kBits>;
  using Weights = ByteWeights<S, kBits, false>;
  using Code = typename Weights::Code;
  using AllGroups = Groups<S, 2, Code::kNibbles>;
  using I = typename S::I;
  using F = typename S::F;
  static constexpr int kMaxRows = S::kIntRows, kMaxRowsAlone = S::kIntRowsAlone;
  static constexpr int kDirectTiles = 2, kDirectRows = 0;
  static constexpr bool kOverwrites = true;
  // So that every range of columns begins with a piece.
  static_assert(kDirectGroups % Panel::kGroups == 0);

  template <int R>
  KT_NOINLINE static void dot(const WeightLayout& layout, const uint8_t* block, const Range& range,
                              const uint8_t* tile, float* out, const Prefetch& prefetch,
                              const Ahead<S>& ahead) {
    Ahead<S> coming = ahead;
    constexpr int V = vectors_at_once<S>(R, S::kIntCells);
    const I levels = S::zero_i();
    const I excess = S::set1_i32(-16 * layout.byte_bias());
    const int64_t end = range.first + range.count;
    AllGroups groups(layout, Code::kBytes, block);
    for (int v0 = 0; v0 < static_cast<int>(kBlockRows) / S::kLanes; v0 += V) {
      ShortTile<S, R, 2> x(tile, range.groups, range.first);
      F piece[V][R];
      I total[V][R];
      clear_sums<S>(piece);
      clear_sums<S>(total);
      int64_t first = range.first;  // of the groups that share an outer scale
      const uint8_t* group = groups.template begin<V>(range.first, v0);
      for (int64_t g = range.first;; group = groups.template next<V>(v0), x.next()) {
        if (v0 == 0) coming.step();
        groups.ask_scales(group, prefetch);
        // Before the codes, as a Zen 4 follows ascending lines alone.
        S::prefetch(group - 128);
        S::prefetch(group - 64);
        I units[V][Code::kUnits], of_weights[2][V];
        const uint8_t* codes = group + v0 * S::kLanes * 4;
        KT_UNROLL
        for (int half = 0; half < 2; ++half) {
          I sum[V][R], inner[V];
          Weights::sum_half(half, sum, of_weights[half], excess, units, codes, levels, x, prefetch);
          KT_UNROLL
          for (int v = 0; v < V; ++v) {
            inner[v] = inner_of(groups, group, half, v0 + v);
            of_weights[half][v] = S::mul_i16(of_weights[half][v], inner[v]);
          }
          add_scaled_sums<S>(total, sum, inner, x, half);
        }
        I both[V];
        KT_UNROLL
        for (int v = 0; v < V; ++v) both[v] = S::pair16(of_weights[0][v], of_weights[1][v]);
        add_pairs<S>(total, both, x.centres);
        const bool scale_ends = ends(groups, g, end);
        if (scale_ends || (g + 1) % kSummedGroups == 0) {
          F scale[V];
          KT_UNROLL
          for (int v = 0; v < V; ++v) scale[v] = groups.outer(0, v0 + v);
          add_scaled<S>(piece, total, scale);
        }
        if (scale_ends && groups.has_offsets()) {
          F offset[V], of_offsets[V][R];
          clear_sums<S>(of_offsets);
          const float* values = x.values - (g - first) * 2 * R;
          const uint8_t* at = group - (g - first) * layout.group_bytes();
          for (; first <= g; ++first, at += layout.group_bytes()) {
            for (int half = 0; half < 2; ++half, values += R) {
              KT_UNROLL
              for (int v = 0; v < V; ++v) offset[v] = groups.inner_offset(at, half, v0 + v);
              add_products<S, V, R>(of_offsets, offset, values);
            }
          }
          KT_UNROLL
          for (int v = 0; v < V; ++v) offset[v] = groups.outer_offset(0, v0 + v);
          add_multiples<S>(piece, of_offsets, offset);
        }
        if (scale_ends) first = g + 1;
        ++g;
        if (g == end || g % Panel::kGroups == 0) {
          add_units<S>(piece, x.units, g <= Panel::kGroups, out, v0);
          if (g == end) break;
          x.units += R;
          clear_sums<S>(piece);
        }
      }
    }
  }

  KT_NOINLINE static void expand(const WeightLayout& layout, const uint8_t* block,
                                 const Range& range, Panel& panel) {
    constexpr int kVectors = static_cast<int>(kBlockRows) / S::kLanes;
    const I levels = S::zero_i();
    const I excess = S::set1_i32(-16 * layout.byte_bias());
    AllGroups groups(layout, Code::kBytes, block);
    panel.has_offsets = groups.has_offsets();
    for (int64_t g = 0; g < range.count; ++g) {
      const uint8_t* group = g == 0 ? groups.template begin<kVectors>(range.first, 0)
                                    : groups.template next<kVectors>(0);
      panel.ends[g] = ends(groups, range.first + g, range.first + range.count);
      for (int v = 0; v < kVectors; ++v) {
        const int64_t row = v * S::kLanes, at = g * kBlockRows + row;
        I of_weights[2] = {excess, excess};
        Weights::expand(group + row * 4, levels, panel.weights + g * 8 * kUnitBytes + row * 4,
                        of_weights);
        for (int half = 0; half < 2; ++half) {
          const I inner = inner_of(groups, group, half, v);
          of_weights[half] = S::mul_i16(of_weights[half], inner);
          S::store_i(panel.inner + ((2 * g + half) * kBlockRows + row) * 4, inner);
        }
        S::store_i(panel.sums + at * 4, S::pair16(of_weights[0], of_weights[1]));
        S::store(panel.scales + at, groups.outer(0, v));
        if (!panel.has_offsets) continue;
        S::store(panel.offsets + at, groups.outer_offset(0, v));
        for (int half = 0; half < 2; ++half) {
          S::store(panel.inner_offsets + (2 * g + half) * kBlockRows + row,
                   groups.inner_offset(group, half, v));
        }
      }
    }
  }

 private:
  // A group's inner scales of a half, as sums are multiplied with them.
  static KT_INLINE I inner_of(const AllGroups& groups, const uint8_t* group, int half, int v) {
    const I inner = groups.inner_scale(group, half, v);
    if constexpr (S::kByteDots) return inner;
    return S::twice16(inner);
  }
  // Whether the next group has another outer scale, or unit.
  static KT_INLINE bool ends(const AllGroups& groups, int64_t group, int64_t end) {
    return groups.ends_span() || group + 1 == end || (group + 1) % Panel::kGroups == 0;
  }
};

}  // namespace ktcore::KTCORE_ISA
