// Weights of up to five bits times activations of eight, with one set of scales for a group: a sum of 16 products
// fits in 16 bits, so that one 16-bit dot product multiplies it by the activations' factor (ShortCodec) and
// adds it to the sum of all columns that share a scale of the weights. Another adds the centres of 32 columns,
// which multiply the sums of the weights in each half. For what is shared with wider weights, see bytes.h.
#pragma once

namespace ktcore::KTCORE_ISA {

// Where the parts of a tile of ShortCodec are, from a group on, the first of a piece.
template <class S, int R, int kSets>
struct ShortTile {
  const uint8_t* items;
  const uint8_t* factors;  // of 16 columns
  const int32_t* starts;   // of 16 columns
  const uint8_t* centres;  // of 32 columns, in pairs
  const float* values;     // of 32 columns or, for two sets, of 16
  const float* units;      // of a piece

  KT_INLINE ShortTile(const uint8_t* tile, int64_t groups, int64_t first) {
    using Codec = ShortCodec<S, kSets>;
    const auto part = [&](int64_t before, int64_t size) {
      return tile + (groups * before + first * size) * 4 * R;
    };
    items = part(0, 8);
    factors = part(8, 2);
    starts = reinterpret_cast<const int32_t*>(part(10, 2));
    centres = part(12, 1);
    values = reinterpret_cast<const float*>(part(13, kSets));
    units =
        reinterpret_cast<const float*>(part(Codec::kWords, 0)) + first / Codec::kPieceGroups * R;
  }
  KT_INLINE void next() {
    items += 32 * R;
    factors += 8 * R;
    starts += 2 * R;
    centres += 4 * R;
    values += kSets * R;
  }
};

// Adds, without byte dot products, a group's starts.
template <class S, int V, int R>
static KT_INLINE void add_starts(typename S::I (&total)[V][R], const ShortTile<S, R, 1>& x) {
  if constexpr (!S::kByteDots) {
    KT_UNROLL
    for (int r = 0; r < R; ++r) {
      const typename S::I start = S::set1_i32(x.starts[r] + x.starts[R + r]);
      KT_UNROLL
      for (int v = 0; v < V; ++v) total[v][r] = S::add_i32(total[v][r], start);
    }
  }
}
// Adds products of two numbers of 16 bits for each row of weights and two of each row of activations.
template <class S, int V, int R>
static KT_INLINE void add_pairs(typename S::I (&total)[V][R], const typename S::I (&of_weights)[V],
                                const uint8_t* pairs) {
  KT_UNROLL
  for (int r = 0; r < R; ++r) {
    const typename S::I pair = S::broadcast4(pairs + 4 * r);
    KT_UNROLL
    for (int v = 0; v < V; ++v) total[v][r] = S::dot_i16(total[v][r], of_weights[v], pair);
  }
}
// Adds the sums of products of 16 columns, times the activations' factors.
template <class S, int V, int R>
static KT_INLINE void add_sums(typename S::I (&total)[V][R], const typename S::I (&sum)[V][R],
                               const uint8_t* factors) {
  KT_UNROLL
  for (int r = 0; r < R; ++r) {
    const typename S::I factor = S::broadcast4(factors + 4 * r);
    KT_UNROLL
    for (int v = 0; v < V; ++v) total[v][r] = S::dot_i16(total[v][r], sum[v][r], factor);
  }
}
// Adds the integer sums of all columns that share a scale, times it, and begins new ones.
template <class S, int V, int R>
static KT_INLINE void add_scaled(typename S::F (&piece)[V][R], typename S::I (&total)[V][R],
                                 const typename S::F (&scale)[V]) {
  KT_UNROLL
  for (int v = 0; v < V; ++v) {
    KT_UNROLL
    for (int r = 0; r < R; ++r) {
      piece[v][r] = add_product<S>(piece[v][r], S::to_f32(total[v][r]), scale[v]);
      total[v][r] = S::zero_i();
    }
  }
}
// Adds a piece, whose sums are in units, to `out`.
template <class S, int V, int R>
static KT_INLINE void add_units(const typename S::F (&piece)[V][R], const float* units,
                                bool is_first, float* out, int v0) {
  KT_UNROLL
  for (int r = 0; r < R; ++r) {
    const typename S::F unit = S::set1(units[r]);
    KT_UNROLL
    for (int v = 0; v < V; ++v) {
      float* to = out + r * kBlockRows + (v0 + v) * S::kLanes;
      S::store(to, S::fma(piece[v][r], unit, is_first ? S::zero() : S::load(to)));
    }
  }
}

// A piece of a block's columns.
template <class S, int kBits>
struct ShortPanel {
  using F = typename S::F;
  using I = typename S::I;
  static constexpr int64_t kGroups = ShortCodec<S, 1>::kPieceGroups;
  alignas(64) uint8_t weights[kGroups * 8 * kUnitBytes];  // [quad][32 rows][4 columns]
  alignas(64) float scales[kGroups * kBlockRows];         // [group][32 rows]
  alignas(64) float offsets[kGroups * kBlockRows];        // where has_offsets
  alignas(64) uint8_t sums[kGroups * kBlockRows * 4];     // [group][32 rows][half] i16, of weights
  bool ends[kGroups];  // whether a group's scale is not the next one's
  bool has_offsets = false;

  // Adds a tile times the piece that was expanded to `out` [R][32].
  template <int R>
  KT_NOINLINE void dot(const Range& range, const uint8_t* tile, float* out,
                       const Ahead<S>& ahead) const {
    Ahead<S> coming = ahead;
    constexpr int V = vectors_at_once<S>(R, S::kIntCells);
    for (int v0 = 0; v0 < static_cast<int>(kBlockRows) / S::kLanes; v0 += V) {
      const int64_t row = v0 * S::kLanes;
      ShortTile<S, R, 1> x(tile, range.groups, range.first);
      F piece[V][R];
      I total[V][R];
      clear_sums<S>(piece);
      clear_sums<S>(total);
      for (int64_t g = 0; g < range.count; ++g, x.next()) {
        if (v0 == 0) coming.step();
        I of_weights[V], sum[V][R];
        load_lanes<S>(of_weights, sums, g, row);
        add_starts<S>(total, x);
        add_pairs<S>(total, of_weights, x.centres);
        KT_UNROLL
        for (int half = 0; half < 2; ++half) {
          sum_half<S, kBits>(sum, weights + 8 * g * kUnitBytes + row * 4, x, half);
          add_sums<S>(total, sum, x.factors + half * 4 * R);
        }
        if (ends[g]) {
          F scale[V];
          load_set<S>(scale, scales, g, row);
          add_scaled<S>(piece, total, scale);
        }
        if (has_offsets) {
          F offset[V];
          load_set<S>(offset, offsets, g, row);
          add_products<S, V, R>(piece, offset, x.values);
        }
      }
      add_units<S>(piece, x.units, range.first == 0, out, v0);
    }
  }
};

// Weights as in Coded (int16.h), with one set of scales a group.
template <class S, int kBits>
struct ShortCoded {
  using Fine = Coded<S, Codes<S, kBits, false>, 1>;
  using Codec = ShortCodec<S, 1>;
  using Panel = ShortPanel<S, kBits>;
  using Weights = ByteWeights<S, kBits, false>;
  using Code = typename Weights::Code;
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
    const I excess = S::set1_i32(-16 * layout.short_bias());
    const int64_t end = range.first + range.count;
    Groups<S, 1> groups(layout, Code::kBytes, block);
    const bool has_offsets = adds_offsets(layout, groups);
    for (int v0 = 0; v0 < static_cast<int>(kBlockRows) / S::kLanes; v0 += V) {
      ShortTile<S, R, 1> x(tile, range.groups, range.first);
      F piece[V][R];
      I total[V][R];
      clear_sums<S>(piece);
      clear_sums<S>(total);
      const uint8_t* group = groups.template begin<V>(range.first, v0);
      for (int64_t g = range.first;; group = groups.template next<V>(v0), x.next()) {
        if (v0 == 0) coming.step();
        groups.ask_scales(group, prefetch);
        I units[V][Code::kUnits], of_weights[2][V];
        const uint8_t* codes = group + v0 * S::kLanes * 4;
        KT_UNROLL
        for (int half = 0; half < 2; ++half) {
          I sum[V][R];
          Weights::sum_half(half, sum, of_weights[half], excess, units, codes, levels, x, prefetch);
          add_sums<S>(total, sum, x.factors + half * 4 * R);
        }
        I both[V];
        KT_UNROLL
        for (int v = 0; v < V; ++v) both[v] = S::pair16(of_weights[0][v], of_weights[1][v]);
        add_starts<S>(total, x);
        add_pairs<S>(total, both, x.centres);
        const bool scale_ends = ends(layout, groups, g, end);
        F scale[V];
        if (scale_ends || kShifts) groups.template scales<V>(group, 0, v0, scale);
        if (scale_ends) add_scaled<S>(piece, total, scale);
        if (has_offsets) {
          F offset[V];
          KT_UNROLL
          for (int v = 0; v < V; ++v)
            offset[v] = offset_of(layout, groups, group, v0 + v, scale[v]);
          add_products<S, V, R>(piece, offset, x.values);
        }
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
    const I excess = S::set1_i32(-16 * layout.short_bias());
    Groups<S, 1> groups(layout, Code::kBytes, block);
    panel.has_offsets = adds_offsets(layout, groups);
    for (int64_t g = 0; g < range.count; ++g) {
      const uint8_t* group = g == 0 ? groups.template begin<kVectors>(range.first, 0)
                                    : groups.template next<kVectors>(0);
      panel.ends[g] = ends(layout, groups, range.first + g, range.first + range.count);
      for (int v = 0; v < kVectors; ++v) {
        const int64_t row = v * S::kLanes, at = g * kBlockRows + row;
        I of_weights[2] = {excess, excess};
        Weights::expand(group + row * 4, levels, panel.weights + g * 8 * kUnitBytes + row * 4,
                        of_weights);
        S::store_i(panel.sums + at * 4, S::pair16(of_weights[0], of_weights[1]));
        const F scale = groups.scale(group, 0, v);
        S::store(panel.scales + at, scale);
        if (panel.has_offsets) {
          S::store(panel.offsets + at, offset_of(layout, groups, group, v, scale));
        }
      }
    }
  }

 private:
  // Whether the bias that fits 16 bits is not the layout's own: the rest is an offset.
  static constexpr bool kShifts = kBits == 5;

  // Whether the integer sums end with this group: with the columns that share a scale, or a unit.
  static KT_INLINE bool ends(const WeightLayout& layout, const Groups<S, 1>& groups, int64_t group,
                             int64_t end) {
    return layout.inner_scales || groups.ends_span() || group + 1 == end ||
           (group + 1) % Panel::kGroups == 0;
  }
  static KT_INLINE bool adds_offsets(const WeightLayout& layout, const Groups<S, 1>& groups) {
    return groups.has_offsets() || layout.short_bias() != layout.byte_bias();
  }
  static KT_INLINE F offset_of(const WeightLayout& layout, const Groups<S, 1>& groups,
                               const uint8_t* group, int v, F scale) {
    const F stored = groups.has_offsets() ? groups.offset(group, 0, v) : S::zero();
    if constexpr (!kShifts) return stored;
    const int32_t shift = layout.short_bias() - layout.byte_bias();
    return S::fma(scale, S::set1(static_cast<float>(shift)), stored);
  }
};

}  // namespace ktcore::KTCORE_ISA
