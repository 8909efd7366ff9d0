// Integer weights times activations of eight bits (ByteCodec): one byte dot product for four columns or, where
// such are not exact, products of pairs of columns in 16 bits, of which as many are added up as fit there. See
// block.h for the two ways, dot and expand.
//
// In 16 columns an activation is scale * q + centre, with q a signed byte, so that a dot product with weights
// w is
//
//   scale * sum(w * q) + centre * sum(w)
//
// Weights are unsigned bytes, as in ByteQuads; the sums of products begin with what that adds to them.
#pragma once

namespace ktcore::KTCORE_ISA {

// Where the parts of a tile of ByteCodec are, from a group on.
template <int R>
struct ByteTile {
  const uint8_t* items;
  const float* scales;    // of 16 columns
  const int32_t* starts;  // of 16 columns
  const float* values;    // of 16, of 16 and of 32 columns
  const float* centres;   // of 16 columns

  KT_INLINE ByteTile(const uint8_t* tile, int64_t groups, int64_t first) {
    const auto part = [&](int64_t before, int64_t size) {
      return tile + (groups * before + first * size) * 4 * R;
    };
    items = part(0, 8);
    scales = reinterpret_cast<const float*>(part(8, 2));
    starts = reinterpret_cast<const int32_t*>(part(10, 2));
    values = reinterpret_cast<const float*>(part(12, 3));
    centres = reinterpret_cast<const float*>(part(15, 2));
  }
  KT_INLINE void next() {
    items += 32 * R;
    scales += 2 * R;
    starts += 2 * R;
    values += 3 * R;
    centres += 2 * R;
  }
};

// Adds the integer sums of 16 columns, with the scales of both sides.
template <class S, bool kScaled, int V, int R>
static KT_INLINE void add_half(typename S::F (&total)[V][R], const typename S::I (&sum)[V][R],
                               const typename S::F (&scale)[V], const float* x_scale) {
  KT_UNROLL
  for (int r = 0; r < R; ++r) {
    const typename S::F x = S::set1(x_scale[r]);
    KT_UNROLL
    for (int v = 0; v < V; ++v) {
      typename S::F both = x;
      if constexpr (kScaled) both = S::mul(scale[v], x);
      total[v][r] = add_product<S>(total[v][r], S::to_f32(sum[v][r]), both);
    }
  }
}
// Adds for every row what a number of its own makes of a number for each of the weights' rows.
template <class S, int V, int R>
static KT_INLINE void add_products(typename S::F (&total)[V][R],
                                   const typename S::F (&of_weights)[V], const float* x) {
  KT_UNROLL
  for (int r = 0; r < R; ++r) {
    const typename S::F of_row = S::set1(x[r]);
    KT_UNROLL
    for (int v = 0; v < V; ++v) total[v][r] = add_product<S>(total[v][r], of_weights[v], of_row);
  }
}

template <class S, int V, int R>
static KT_INLINE void start_sums(typename S::I (&sum)[V][R], const int32_t* starts) {
  KT_UNROLL
  for (int r = 0; r < R; ++r) {
    const typename S::I start = S::set1_i32(starts[r]);
    KT_UNROLL
    for (int v = 0; v < V; ++v) sum[v][r] = start;
  }
}
// Adds the products of a quad.
template <class S, int V, int R>
static KT_INLINE void add_items(typename S::I (&sum)[V][R], const typename S::I (&weight)[V],
                                const uint8_t* items) {
  KT_UNROLL
  for (int r = 0; r < R; ++r) {
    const typename S::I item = S::broadcast4(items + 4 * r);
    KT_UNROLL
    for (int v = 0; v < V; ++v) sum[v][r] = S::dot_u8(sum[v][r], weight[v], item);
  }
}

// Where byte dot products are not exact: adds the products of quads Q and Q + 1 of 16 columns, two columns
// at a time, to sums of as many as fit in 16 bits. With 5 bits and fewer those are the sums of all 16
// columns, and end_sums widens them; with 6 they are widened here.
template <int kBits>
static constexpr bool kFitsPairs = 8 * 127 * ((1 << kBits) - 1) <= 32767;
template <class S, int kBits, int Q, int V, int R, class Tile>
static KT_INLINE void add_two(typename S::I (&sum)[V][R], const typename S::I (&first)[V],
                              const typename S::I (&second)[V], const Tile& x, int half) {
  static_assert(4 * 127 * ((1 << kBits) - 1) <= 32767);
  KT_UNROLL
  for (int r = 0; r < R; ++r) {
    const uint8_t* items = x.items + (4 * half + Q) * 4 * R + 4 * r;
    const typename S::I left = S::broadcast4(items), right = S::broadcast4(items + 4 * R);
    KT_UNROLL
    for (int v = 0; v < V; ++v) {
      const typename S::I pairs =
          S::add_i16(S::pairs_u8(first[v], left), S::pairs_u8(second[v], right));
      if constexpr (kFitsPairs<kBits>) {
        sum[v][r] = Q == 0 ? pairs : S::add_i16(sum[v][r], pairs);
      } else {
        sum[v][r] = S::add_i32(Q == 0 ? S::set1_i32(x.starts[half * R + r]) : sum[v][r],
                               S::add_pairs(pairs));
      }
    }
  }
}
template <class S, int kBits, int V, int R>
static KT_INLINE void end_sums([[maybe_unused]] typename S::I (&sum)[V][R],
                               [[maybe_unused]] const int32_t* starts) {
  if constexpr (!S::kByteDots && kFitsPairs<kBits>) {
    KT_UNROLL
    for (int r = 0; r < R; ++r) {
      const typename S::I start = S::set1_i32(starts[r]);
      KT_UNROLL
      for (int v = 0; v < V; ++v) sum[v][r] = S::add_i32(S::add_pairs(sum[v][r]), start);
    }
  }
}

// A quad of a panel.
template <class S, int V, int R>
static KT_INLINE void load_quad(typename S::I (&weight)[V], const uint8_t* unit) {
  KT_UNROLL
  for (int v = 0; v < V; ++v) {
    weight[v] = S::load_i(unit + v * S::kLanes * 4);
    if constexpr (R > 1) KT_IN_REGISTER(weight[v]);
  }
}
// The sums of products of a group's half of a panel, whose units begin at `weights`. Without byte dot products
// end_sums, or what takes its place, is still to come.
template <class S, int kBits, int V, int R, class Tile>
static KT_INLINE void sum_half(typename S::I (&sum)[V][R], const uint8_t* weights, const Tile& x,
                               int half) {
  const uint8_t* unit = weights + 4 * half * kUnitBytes;
  if constexpr (S::kByteDots) {
    start_sums<S, V, R>(sum, x.starts + half * R);
    KT_UNROLL
    for (int quad = 0; quad < 4; ++quad) {
      typename S::I weight[V];
      load_quad<S, V, R>(weight, unit + quad * kUnitBytes);
      add_items<S, V, R>(sum, weight, x.items + (4 * half + quad) * 4 * R);
    }
  } else {
    typename S::I first[V], second[V];
    load_quad<S, V, R>(first, unit);
    load_quad<S, V, R>(second, unit + kUnitBytes);
    add_two<S, kBits, 0, V, R>(sum, first, second, x, half);
    load_quad<S, V, R>(first, unit + 2 * kUnitBytes);
    load_quad<S, V, R>(second, unit + 3 * kUnitBytes);
    add_two<S, kBits, 2, V, R>(sum, first, second, x, half);
  }
}
// V vectors of a set of 32 numbers, from `row` on.
template <class S, int V>
static KT_INLINE void load_set(typename S::F (&to)[V], const float* sets, int64_t set,
                               int64_t row) {
  KT_UNROLL
  for (int v = 0; v < V; ++v) to[v] = S::load(sets + set * kBlockRows + row + v * S::kLanes);
}

// The same of lanes of integers.
template <class S, int V>
static KT_INLINE void load_lanes(typename S::I (&to)[V], const uint8_t* sets, int64_t set,
                                 int64_t row) {
  KT_UNROLL
  for (int v = 0; v < V; ++v) {
    to[v] = S::load_i(sets + (set * kBlockRows + row + v * S::kLanes) * 4);
  }
}

// Panels of unsigned bytes, of which kBits are used, with kSets sets of scales a group: none, one, or two
// for 16 columns each.
template <class S, int kBits, int kSets>
struct BytePanel {
  using F = typename S::F;
  using I = typename S::I;
  static constexpr int64_t kGroups = 2 * kPanelGroups;  // of half as many bytes
  static constexpr int64_t kScales = kSets > 0 ? kGroups * kSets * kBlockRows : 16;
  alignas(64) uint8_t weights[kGroups * 8 * kUnitBytes];  // [quad][32 rows][4 columns]
  alignas(64) float scales[kScales];                      // [group][set][32 rows]
  alignas(64) float offsets[kScales];                     // where has_offsets
  alignas(64) float sums[kGroups * 2 * kBlockRows];       // [group][half][32 rows], of weights
  bool has_offsets = false;

  // Adds a tile times the range that was expanded to `out` [R][32].
  template <int R>
  KT_NOINLINE void dot(const Range& range, const uint8_t* tile, float* out,
                       const Ahead<S>& ahead) const {
    Ahead<S> coming = ahead;
    constexpr int V = vectors_at_once<S>(R, S::kIntCells);
    for (int v0 = 0; v0 < static_cast<int>(kBlockRows) / S::kLanes; v0 += V) {
      const int64_t row = v0 * S::kLanes;
      ByteTile<R> x(tile, range.groups, range.first);
      F total[V][R];
      begin_sums<S>(range, total, out, v0);
      for (int64_t g = 0; g < range.count; ++g, x.next()) {
        if (v0 == 0) coming.step();
        KT_UNROLL
        for (int half = 0; half < 2; ++half) {
          I sum[V][R];
          sum_half<S, kBits>(sum, weights + 8 * g * kUnitBytes + row * 4, x, half);
          end_sums<S, kBits>(sum, x.starts + half * R);
          F scale[V];
          if constexpr (kSets > 0) {
            load_set<S>(scale, scales, kSets * g + (kSets == 2 ? half : 0), row);
          }
          add_half<S, (kSets > 0), V, R>(total, sum, scale, x.scales + half * R);
        }
        KT_UNROLL
        for (int half = 0; half < 2; ++half) {
          F sum[V];
          load_set<S>(sum, sums, 2 * g + half, row);
          add_products<S, V, R>(total, sum, x.centres + half * R);
        }
        if constexpr (kSets > 0) {
          if (!has_offsets) continue;
          KT_UNROLL
          for (int set = 0; set < kSets; ++set) {
            F offset[V];
            load_set<S>(offset, offsets, kSets * g + set, row);
            add_products<S, V, R>(total, offset, x.values + (kSets == 1 ? 2 : set) * R);
          }
        }
      }
      store_sums<S>(total, out, v0);
    }
  }
};

// Codes as the unsigned bytes that stand for weights.
template <class S, int kBits, bool kTable>
struct ByteWeights {
  using Code = Codes<S, kBits, kTable>;
  using Quad = ByteQuads<S>;
  using I = typename S::I;

  // The sums of products of a group's half, as of a panel's, and those of its weights, which begin with `excess`.
  template <int V, int R, class Tile>
  static KT_INLINE void sum_half(int half, I (&sum)[V][R], I (&of_weights)[V], I excess,
                                 I (&units)[V][Code::kUnits], const uint8_t* w, I levels,
                                 const Tile& x, Prefetch prefetch) {
    KT_UNROLL
    for (int v = 0; v < V; ++v) of_weights[v] = excess;
    if (half == 0) {
      add_quads<0>(sum, of_weights, units, w, levels, x, prefetch);
    } else {
      add_quads<4>(sum, of_weights, units, w, levels, x, prefetch);
    }
  }
  // Widens a group of a vector of rows, and adds its weights to the sums of each half.
  static KT_INLINE void expand(const uint8_t* from, I levels, uint8_t* to, I (&of_weights)[2]) {
    expand_quads(from, levels, to, of_weights, std::make_integer_sequence<int, 8>());
  }

 private:
  // Whether the codes of four columns can be added up as bytes.
  static constexpr bool kAddsBytes = !kTable && kBits <= 6;

  // Adds four quads from number kFirst on to sums of products, and to those of the weights.
  template <int kFirst, int V, int R, class Tile>
  static KT_INLINE void add_quads(I (&sum)[V][R], I (&of_weights)[V], I (&units)[V][Code::kUnits],
                                  const uint8_t* w, I levels, const Tile& x, Prefetch prefetch) {
    I bytes[V];
    if constexpr (S::kByteDots) {
      start_sums<S, V, R>(sum, x.starts + kFirst / 4 * R);
      add_quad<kFirst, V, R>(sum, of_weights, bytes, units, w, levels, x.items, prefetch);
      add_quad<kFirst + 1, V, R>(sum, of_weights, bytes, units, w, levels, x.items, prefetch);
      add_quad<kFirst + 2, V, R>(sum, of_weights, bytes, units, w, levels, x.items, prefetch);
      add_quad<kFirst + 3, V, R>(sum, of_weights, bytes, units, w, levels, x.items, prefetch);
    } else {
      I first[V], second[V];
      widen<kFirst, V>(first, of_weights, bytes, units, w, levels, prefetch);
      widen<kFirst + 1, V>(second, of_weights, bytes, units, w, levels, prefetch);
      add_two<S, kBits, 0, V, R>(sum, first, second, x, kFirst / 4);
      widen<kFirst + 2, V>(first, of_weights, bytes, units, w, levels, prefetch);
      widen<kFirst + 3, V>(second, of_weights, bytes, units, w, levels, prefetch);
      add_two<S, kBits, 2, V, R>(sum, first, second, x, kFirst / 4);
    }
  }
  template <int Q, int V, int R>
  static KT_INLINE void add_quad(I (&sum)[V][R], I (&of_weights)[V], I (&bytes)[V],
                                 I (&units)[V][Code::kUnits], const uint8_t* w, I levels,
                                 const uint8_t* items, Prefetch prefetch) {
    I weight[V];
    widen<Q, V>(weight, of_weights, bytes, units, w, levels, prefetch);
    add_items<S, V, R>(sum, weight, items + Q * 4 * R);
  }
  // Quad Q's weights, and their part of the sums of weights.
  template <int Q, int V>
  static KT_INLINE void widen(I (&weight)[V], I (&of_weights)[V], I (&bytes)[V],
                              I (&units)[V][Code::kUnits], const uint8_t* w, I levels,
                              Prefetch prefetch) {
    KT_UNROLL
    for (int v = 0; v < V; ++v) {
      Code::template read<Q, true>(units[v], w + v * S::kLanes * 4, prefetch);
    }
    KT_UNROLL
    for (int v = 0; v < V; ++v) {
      weight[v] = Code::template widen<Quad, Q>(units[v], levels);
      bytes[v] = kAddsBytes && Q % 4 > 0 ? S::add_i8(bytes[v], weight[v]) : weight[v];
      if constexpr (!kAddsBytes || Q % 4 == 3) {
        of_weights[v] = S::dot_u8(of_weights[v], bytes[v], S::set1_i8(1));
      }
    }
  }
  template <int... Q>
  static KT_INLINE void expand_quads(const uint8_t* from, I levels, uint8_t* to, I (&of_weights)[2],
                                     std::integer_sequence<int, Q...>) {
    I units[Code::kUnits];
    (expand_quad<Q>(from, units, levels, to, of_weights[Q / 4]), ...);
  }
  template <int Q>
  static KT_INLINE void expand_quad(const uint8_t* from, I (&units)[Code::kUnits], I levels,
                                    uint8_t* to, I& of_weights) {
    Code::template read<Q, false>(units, from, {});
    const I weight = Code::template widen<Quad, Q>(units, levels);
    of_weights = S::dot_u8(of_weights, weight, S::set1_i8(1));
    S::store_i(to + Q * kUnitBytes, weight);
  }
};

template <class S, int kBits, bool kTable, int kSets>
using FineOf =
    std::conditional_t<kSets == 0, Int8Channel<S>, Coded<S, Codes<S, kBits, kTable>, kSets>>;

// Weights as in Coded (int16.h), times activations of eight bits. With no set of scales they are of 8
// bits and have a scale for each row, behind the block's groups.
template <class S, int kBits, bool kTable, int kSets>
struct ByteCoded {
  using Fine = FineOf<S, kBits, kTable, kSets>;
  using Codec = ByteCodec<S>;
  using Panel = BytePanel<S, S::kByteDots ? 8 : kBits, kSets>;
  using Weights = ByteWeights<S, kBits, kTable>;
  using Code = typename Weights::Code;
  using Quad = typename Weights::Quad;
  using I = typename S::I;
  using F = typename S::F;
  static constexpr int kMaxRows = S::kIntRows, kMaxRowsAlone = S::kIntRowsAlone;
  static constexpr int kDirectTiles = 2, kDirectRows = 0;
  static constexpr bool kOverwrites = true, kRowScales = kSets == 0;

  template <int R>
  KT_NOINLINE static void dot(const WeightLayout& layout, const uint8_t* block, const Range& range,
                              const uint8_t* tile, float* out, const Prefetch& prefetch,
                              const Ahead<S>& ahead) {
    Ahead<S> coming = ahead;
    constexpr int V = vectors_at_once<S>(R, S::kIntCells);
    const I levels = Quad::table(layout.levels);
    const I excess = S::set1_i32(-16 * layout.byte_bias());
    Groups<S, kSets> groups(layout, Code::kBytes, block);
    for (int v0 = 0; v0 < static_cast<int>(kBlockRows) / S::kLanes; v0 += V) {
      ByteTile<R> x(tile, range.groups, range.first);
      F total[V][R];
      begin_sums<S>(range, total, out, v0);
      const uint8_t* group = groups.template begin<V>(range.first, v0);
      for (int64_t left = range.count;; group = groups.template next<V>(v0), x.next()) {
        if (v0 == 0) coming.step();
        groups.ask_scales(group, prefetch);
        if constexpr (kSets == 2) {  // before the codes, as a Zen 4 follows ascending lines alone
          S::prefetch(group - 128);
          S::prefetch(group - 64);
        }
        F scale[2][V], offset[2][V];
        I units[V][Code::kUnits], of_weights[2][V];
        const uint8_t* codes = group + v0 * S::kLanes * 4;
        KT_UNROLL
        for (int half = 0; half < 2; ++half) {
          I sum[V][R];
          Weights::sum_half(half, sum, of_weights[half], excess, units, codes, levels, x, prefetch);
          end_sums<S, kBits>(sum, x.starts + half * R);
          if (half < kSets) {
            groups.template scales<V>(group, half, v0, scale[half]);
            if (groups.has_offsets()) groups.template offsets<V>(group, half, v0, offset[half]);
          }
          add_half<S, (kSets > 0), V, R>(total, sum, scale[kSets == 2 ? half : 0],
                                         x.scales + half * R);
        }
        KT_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int set = kSets == 2 ? half : 0;
          F sums[V];
          KT_UNROLL
          for (int v = 0; v < V; ++v) {
            sums[v] =
                half_sum(of_weights[half][v], scale[set][v], offset[set][v], groups.has_offsets());
          }
          add_products<S, V, R>(total, sums, x.centres + half * R);
        }
        if constexpr (kSets > 0) {
          if (groups.has_offsets()) {
            KT_UNROLL
            for (int set = 0; set < kSets; ++set) {
              add_products<S, V, R>(total, offset[set], x.values + (kSets == 1 ? 2 : set) * R);
            }
          }
        }
        if (--left == 0) break;
      }
      store_sums<S>(total, out, v0);
    }
  }

  KT_NOINLINE static void expand(const WeightLayout& layout, const uint8_t* block,
                                 const Range& range, Panel& panel) {
    constexpr int kVectors = static_cast<int>(kBlockRows) / S::kLanes;
    const I levels = Quad::table(layout.levels);
    const I excess = S::set1_i32(-16 * layout.byte_bias());
    Groups<S, kSets> groups(layout, Code::kBytes, block);
    panel.has_offsets = groups.has_offsets();
    for (int64_t g = 0; g < range.count; ++g) {
      const uint8_t* group = g == 0 ? groups.template begin<kVectors>(range.first, 0)
                                    : groups.template next<kVectors>(0);
      for (int v = 0; v < kVectors; ++v) {
        const int64_t row = v * S::kLanes;
        I of_weights[2] = {excess, excess};
        Weights::expand(group + row * 4, levels, panel.weights + g * 8 * kUnitBytes + row * 4,
                        of_weights);
        F scale[2] = {S::zero(), S::zero()}, offset[2] = {S::zero(), S::zero()};
        for (int set = 0; set < kSets; ++set) {
          const int64_t at = (kSets * g + set) * kBlockRows + row;
          scale[set] = groups.scale(group, set, v);
          S::store(panel.scales + at, scale[set]);
          if (!panel.has_offsets) continue;
          offset[set] = groups.offset(group, set, v);
          S::store(panel.offsets + at, offset[set]);
        }
        for (int half = 0; half < 2; ++half) {
          const int set = kSets == 2 ? half : 0;
          S::store(panel.sums + (2 * g + half) * kBlockRows + row,
                   half_sum(of_weights[half], scale[set], offset[set], panel.has_offsets));
        }
      }
    }
  }

 private:
  // The sum of weights of 16 columns, out of that of the integers that they are before scales.
  static KT_INLINE F half_sum(I integers, F scale, F offset, bool has_offsets) {
    const F sum = S::to_f32(integers);
    if constexpr (kSets == 0) return sum;
    if (!has_offsets) return S::mul(sum, scale);
    return S::fma(sum, scale, S::mul(offset, S::set1(static_cast<float>(kGroup / 2))));
  }
};

}  // namespace ktcore::KTCORE_ISA
