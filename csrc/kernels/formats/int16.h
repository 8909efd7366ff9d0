// Integer weights times activations of 16 bits (Int16Codec).
#pragma once

namespace ktcore::KTCORE_ISA {

// One group of 32 columns is 16 pairs; a panel holds kPanelGroups groups: [pair][32 rows] of 16-bit
// pairs, 16 KiB, which leaves the rest of a first-level cache to a tile of activations.
static constexpr int64_t kPanelGroups = 8;

// Whether outer scales multiply the sums of a panel's columns instead of each group's: where they are the
// panel's own, and the sums are of nothing else.
static inline bool scaled_last(const WeightLayout& layout) {
  return layout.folded() && layout.span % kPanelGroups == 0 && !layout.offsets &&
         !layout.inner_offsets;
}

// Panels of 16-bit weights, for all integer formats, with kSets sets of scales a group: none, one, or
// two for 16 columns each. Where they are `folded`, the inner scales of two sets have multiplied the
// weights, and one scale is left.
template <class S, int kSets>
struct Int16Panel {
  static constexpr int64_t kGroups = kPanelGroups;
  static constexpr int64_t kScales = kSets > 0 ? kGroups * kSets * kBlockRows : 16;
  alignas(64) uint8_t weights[kGroups * (kGroup / 2) * kUnitBytes];
  alignas(64) float scales[kScales];   // [group][set][32 rows], folded [group][32 rows]
  alignas(64) float offsets[kScales];  // [group][set][32 rows], where has_offsets
  bool has_offsets = false, folded = false, scaled_last = false;

  // Adds a tile times the range that was expanded to `out` [R][32].
  template <int R>
  KT_INLINE void dot(const Range& range, const uint8_t* tile, float* out,
                     const Ahead<S>& ahead) const {
    if constexpr (kSets == 2) {
      if (scaled_last) return dot_pieces<R, 1, true>(range, tile, out, ahead);
      if (!folded) return dot_pieces<R, 2, false>(range, tile, out, ahead);
    }
    dot_pieces<R, 1, false>(range, tile, out, ahead);
  }

 private:
  // With kPieces sums of integers for each group.
  template <int R, int kPieces, bool kLast>
  KT_NOINLINE void dot_pieces(const Range& range, const uint8_t* tile, float* out,
                              const Ahead<S>& ahead) const {
    Ahead<S> coming = ahead;
    constexpr int kOffsets = kSets / kPieces;  // of a piece
    constexpr int V = vectors_at_once<S>(R, S::kIntCells);
    const float* x_scale = Int16Codec<S>::scales(tile, R, range.groups) + range.first * R;
    const float* x_value = Int16Codec<S>::values(tile, R, range.groups) + 2 * range.first * R;
    for (int v0 = 0; v0 < static_cast<int>(kBlockRows) / S::kLanes; v0 += V) {
      const uint8_t* w = weights + v0 * S::kLanes * 4;
      const uint8_t* a = tile + range.first * kGroup * 2 * R;
      // The sums of all pieces stay in registers too: through memory, they cost half of the time.
      typename S::F total[V][R];
      if constexpr (kLast) {
        clear_sums<S>(total);
      } else {
        load_sums<S>(total, out, v0);
      }
      for (int64_t piece = 0; piece < range.count * kPieces; ++piece) {
        if (v0 == 0 && piece % kPieces == 0) {
          coming.step();
          ask_items<S, Int16Codec<S>, R, 4>(tile, range, piece / kPieces);
        }
        typename S::I sum[V][R];
        clear_sums<S>(sum);
        // Four pairs a round: unrolled further, compilers keep products instead of sums.
        for (int round = 0; round < static_cast<int>(kGroup) / 8 / kPieces; ++round) {
          KT_UNROLL
          for (int pair = 0; pair < 4; ++pair, w += kUnitBytes, a += 4 * R) {
            typename S::I weight[V];
            KT_UNROLL
            for (int v = 0; v < V; ++v) {
              weight[v] = S::load_i(w + v * S::kLanes * 4);
              if constexpr (R > 1) KT_IN_REGISTER(weight[v]);
            }
            KT_UNROLL
            for (int r = 0; r < R; ++r) {
              const typename S::I x = S::broadcast4(a + r * 4);
              KT_UNROLL
              for (int v = 0; v < V; ++v) sum[v][r] = S::dot_i16(sum[v][r], weight[v], x);
            }
          }
        }
        KT_UNROLL
        for (int r = 0; r < R; ++r) {
          const typename S::F xs = S::set1(x_scale[piece / kPieces * R + r]);
          KT_UNROLL
          for (int v = 0; v < V; ++v) {
            typename S::F scale = xs;
            if constexpr (kSets > 0 && !kLast) {
              scale = S::mul(S::load(scales + piece * kBlockRows + (v0 + v) * S::kLanes), xs);
            }
            total[v][r] = S::fma(S::to_f32(sum[v][r]), scale, total[v][r]);
          }
        }
        if constexpr (kSets > 0 && !kLast) {
          if (!has_offsets) continue;
          for (int64_t at = piece * kOffsets; at < (piece + 1) * kOffsets; ++at) {
            KT_UNROLL
            for (int r = 0; r < R; ++r) {
              const typename S::F x = piece_value<S, kSets, R>(x_value, at, r);
              KT_UNROLL
              for (int v = 0; v < V; ++v) {
                const auto offset = S::load(offsets + at * kBlockRows + (v0 + v) * S::kLanes);
                total[v][r] = S::fma(offset, x, total[v][r]);
              }
            }
          }
        }
      }
      if constexpr (kLast) {
        typename S::F factor[V];
        KT_UNROLL
        for (int v = 0; v < V; ++v) factor[v] = S::load(scales + (v0 + v) * S::kLanes);
        add_piece<S, true>(total, factor, out, v0);
      } else {
        store_sums<S>(total, out, v0);
      }
    }
  }
};

template <class S>
struct Int8Channel {
  using Fine = Int8Channel;
  using Codec = Int16Codec<S>;
  using Panel = Int16Panel<S, 0>;
  static constexpr int kMaxRows = S::kIntRows, kMaxRowsAlone = S::kIntRowsAlone;
  static constexpr int kDirectTiles = 2, kDirectRows = S::kByteRows;
  static constexpr bool kOverwrites = false, kRowScales = true;
  static constexpr int kUnits = static_cast<int>(kGroup) / 4;
  static constexpr int64_t kGroupBytes = kUnits * kUnitBytes;

  template <int R>
  KT_NOINLINE static void dot(const WeightLayout&, const uint8_t* block, const Range& range,
                              const uint8_t* tile, float* out, const Prefetch& prefetch,
                              const Ahead<S>& ahead) {
    Ahead<S> coming = ahead;
    using Quad = Quads<S, R>;
    constexpr int V = vectors_at_once<S>(R, Quad::kCells);
    const float* x_scale = Codec::scales(tile, R, range.groups) + range.first * R;
    const int32_t* x_sum = Codec::sums(tile, R, range.groups) + 2 * range.first * R;
    for (int v0 = 0; v0 < static_cast<int>(kBlockRows) / S::kLanes; v0 += V) {
      typename S::F acc[V][R];
      load_sums<S>(acc, out, v0);
      const uint8_t* a = tile + range.first * kGroup * 2 * R;
      const uint8_t* w = block + range.first * kGroupBytes + v0 * S::kLanes * 4;
      for (int64_t g = 0; g < range.count; ++g, a += 2 * kGroup * R, w += kGroupBytes) {
        if (v0 == 0) coming.step();
        typename Quad::Sum sum[V][R];
        KT_UNROLL
        for (int r = 0; r < R; ++r) {
          const auto start = S::set1_i32(-Quad::kByteBias * piece_sum<1, R>(x_sum, g, r));
          KT_UNROLL
          for (int v = 0; v < V; ++v) sum[v][r] = Quad::start(start);
        }
        KT_UNROLL
        for (int unit = 0; unit < kUnits; ++unit) {
          typename Quad::Weights weight[V];
          KT_UNROLL
          for (int v = 0; v < V; ++v) {
            const uint8_t* p = w + unit * kUnitBytes + v * S::kLanes * 4;
            ask_ahead<S>(p, prefetch);
            weight[v] = Quad::of_bytes(S::load_i(p));
          }
          Quad::template add<V, R>(sum, weight, a + unit * 2 * R * 4);
        }
        KT_UNROLL
        for (int r = 0; r < R; ++r) {
          const typename S::F scale = S::set1(x_scale[g * R + r]);
          KT_UNROLL
          for (int v = 0; v < V; ++v) {
            acc[v][r] = S::fma(S::to_f32(Quad::total(sum[v][r])), scale, acc[v][r]);
          }
        }
      }
      store_sums<S>(acc, out, v0);
    }
  }

  KT_NOINLINE static void expand(const WeightLayout&, const uint8_t* block, const Range& range,
                                 Panel& panel) {
    const uint8_t* w = block + range.first * kGroupBytes;
    uint8_t* to = panel.weights;
    for (int64_t unit = 0; unit < range.count * kUnits;
         ++unit, w += kUnitBytes, to += 2 * kUnitBytes) {
      for (int64_t at = 0; at < kUnitBytes; at += S::kLanes * 4) {
        const auto weights = WordQuads<S>::of_bytes(S::load_i(w + at));
        S::store_i(to + at, weights.even);
        S::store_i(to + kUnitBytes + at, weights.odd);
      }
    }
  }
};

// Weights as codes, which are integers less the layout's bias or stand for some; kSets sets of scales a group. What
// varies more finely is in the layout.
template <class S, class Code, int kSets>
struct Coded {
  using Fine = Coded;
  using Codec = Int16Codec<S, Code::kPairs>;
  using Panel = Int16Panel<S, kSets>;
  using AllGroups = Groups<S, kSets, Code::kNibbles && kSets == 2>;
  using I = typename S::I;
  using F = typename S::F;
  static constexpr int kMaxRows = S::kIntRows, kMaxRowsAlone = S::kIntRowsAlone;
  static constexpr int kDirectTiles = 2, kDirectRows = Code::kPairs ? 0 : S::kByteRows;
  static constexpr bool kOverwrites = false;

  template <int R>
  KT_NOINLINE static void dot(const WeightLayout& layout, const uint8_t* block, const Range& range,
                              const uint8_t* tile, float* out, const Prefetch& prefetch,
                              const Ahead<S>& ahead) {
    Ahead<S> coming = ahead;
    using Quad = typename Code::template Quad<R>;
    constexpr int V = vectors_at_once<S>(R, Quad::kCells);
    const int64_t end = range.first + range.count;
    const float* x_scale = Codec::scales(tile, R, range.groups);
    const int32_t* x_sum = Codec::sums(tile, R, range.groups);
    const float* x_value = Codec::values(tile, R, range.groups);
    const I levels = Quad::table(layout.levels);
    const bool last = kSets == 2 && scaled_last(layout);
    AllGroups groups(layout, Code::kBytes, block);
    for (int v0 = 0; v0 < static_cast<int>(kBlockRows) / S::kLanes; v0 += V) {
      F acc[V][R];
      if (last) {
        clear_sums<S>(acc);
      } else {
        load_sums<S>(acc, out, v0);
      }
      const uint8_t* a = tile + range.first * kGroup * 2 * R;
      const uint8_t* group = groups.template begin<V>(range.first, v0);
      for (int64_t g = range.first;; group = groups.template next<V>(v0), a += 2 * kGroup * R) {
        if (v0 == 0) coming.step();
        groups.ask_scales(group, prefetch);
        if constexpr (kSets == 2) {  // before the codes, as a Zen 4 follows ascending lines alone
          S::prefetch(group - 128);
          S::prefetch(group - 64);
        }
        I sum[V][R], units[V][Code::kUnits];
        sum_set<0, V, R>(layout, group, g, v0, levels, a, x_sum, units, sum, prefetch);
        if constexpr (kSets == 1) {
          add_set<0, V, R>(groups, group, g, v0, x_scale, x_value, sum, acc);
        } else if (!layout.folded()) {
          add_set<0, V, R>(groups, group, g, v0, x_scale, x_value, sum, acc);
          sum_set<1, V, R>(layout, group, g, v0, levels, a, x_sum, units, sum, prefetch);
          add_set<1, V, R>(groups, group, g, v0, x_scale, x_value, sum, acc);
        } else {
          I other[V][R];
          F factor[V];
          sum_set<1, V, R>(layout, group, g, v0, levels, a, x_sum, units, other, prefetch);
          KT_UNROLL
          for (int v = 0; v < V; ++v) {
            const I first = groups.inner_scale(group, 0, v0 + v),
                    second = groups.inner_scale(group, 1, v0 + v);
            KT_UNROLL
            for (int r = 0; r < R; ++r) {
              sum[v][r] = S::add_i32(S::mul_i32(sum[v][r], first), S::mul_i32(other[v][r], second));
            }
            factor[v] = groups.outer(0, v0 + v);
            add_scaled<V, R>(last ? S::set1(1) : factor[v], v, g, x_scale, sum, acc);
          }
          if (last && (groups.ends_span() || g + 1 == end)) {
            add_piece<S, true>(acc, factor, out, v0);
            clear_sums<S>(acc);
          }
          add_offsets<0, V, R>(groups, group, g, v0, x_value, acc);
          add_offsets<1, V, R>(groups, group, g, v0, x_value, acc);
        }
        if (++g == end) break;
      }
      if (!last) store_sums<S>(acc, out, v0);
    }
  }

  KT_NOINLINE static void expand(const WeightLayout& layout, const uint8_t* block,
                                 const Range& range, Panel& panel) {
    constexpr int kVectors = static_cast<int>(kBlockRows) / S::kLanes;
    const I levels = WordQuads<S>::table(layout.levels);
    const I bias = S::set1_i16(static_cast<int16_t>(layout.bias));
    AllGroups groups(layout, Code::kBytes, block);
    uint8_t* to = panel.weights;
    panel.has_offsets = groups.has_offsets();
    panel.folded = layout.folded();
    panel.scaled_last = scaled_last(layout);
    for (int64_t g = 0; g < range.count; ++g, to += kGroup / 2 * kUnitBytes) {
      const uint8_t* group = g == 0 ? groups.template begin<kVectors>(range.first, 0)
                                    : groups.template next<kVectors>(0);
      for (int v = 0; v < kVectors; ++v) {
        const int64_t lanes = v * S::kLanes, at = lanes * 4;
        if (panel.folded) {
          const I factors[] = {S::twice16(groups.inner_scale(group, 0, v)),
                               S::twice16(groups.inner_scale(group, kSets - 1, v))};
          expand_quads<true>(group + at, levels, bias, factors, to + at, Numbers<8>());
          S::store(panel.scales + g * kBlockRows + lanes, groups.outer(0, v));
        } else {
          expand_quads<false>(group + at, levels, bias, nullptr, to + at, Numbers<8>());
        }
        for (int set = 0; set < kSets; ++set) {
          const int64_t place = (g * kSets + set) * kBlockRows + lanes;
          if (!panel.folded) {
            S::store(panel.scales + place, in_units(groups.scale(group, set, v)));
          }
          if (panel.has_offsets) S::store(panel.offsets + place, groups.offset(group, set, v));
        }
      }
    }
  }

 private:
  // A scale of what the codes' integers are units of.
  static KT_INLINE F in_units(F scale) {
    if constexpr (Code::kUnit == 1) return scale;
    return S::mul(scale, S::set1(Code::kUnit));
  }

  template <int N>
  using Numbers = std::make_integer_sequence<int, N>;

  // Times each set's factors, if kFolded.
  template <bool kFolded, int... Q>
  static KT_INLINE void expand_quads(const uint8_t* from, I levels, I bias, const I* factors,
                                     uint8_t* to, std::integer_sequence<int, Q...>) {
    I units[Code::kUnits];
    (expand_quad<kFolded, Q>(from, units, levels, bias, factors, to), ...);
  }
  template <bool kFolded, int Q>
  static KT_INLINE void expand_quad(const uint8_t* from, I (&units)[Code::kUnits], I levels, I bias,
                                    const I* factors, uint8_t* to) {
    Code::template read<Q, false>(units, from, {});
    auto weights = Code::template widen<WordQuads<S>, Q>(units, levels);
    if constexpr (Code::kBiased) {
      weights.even = S::sub_i16(weights.even, bias);
      weights.odd = S::sub_i16(weights.odd, bias);
    }
    if constexpr (kFolded) {
      weights.even = S::mul_i16(weights.even, factors[Q / 4]);
      weights.odd = S::mul_i16(weights.odd, factors[Q / 4]);
    }
    S::store_i(to + 2 * Q * kUnitBytes, weights.even);
    S::store_i(to + (2 * Q + 1) * kUnitBytes, weights.odd);
  }

  // The sums of one set of a group's columns, as integers.
  template <int kSet, int V, int R>
  static KT_INLINE void sum_set(const WeightLayout& layout, const uint8_t* group, int64_t g, int v0,
                                I levels, const uint8_t* a, const int32_t* x_sum,
                                I (&units)[V][Code::kUnits], I (&total)[V][R], Prefetch prefetch) {
    using Quad = typename Code::template Quad<R>;
    constexpr int kQuads = 8 / kSets;
    typename Quad::Sum sum[V][R];
    KT_UNROLL
    for (int r = 0; r < R; ++r) {
      const int32_t of_columns = piece_sum<kSets, R>(x_sum, g * kSets + kSet, r);
      const I start = S::set1_i32(-Code::template bias<Quad>(layout) * of_columns);
      KT_UNROLL
      for (int v = 0; v < V; ++v) sum[v][r] = Quad::start(start);
    }
    add_quads<kSet * kQuads, V, R>(sum, units, group + v0 * S::kLanes * 4, levels, a, prefetch,
                                   Numbers<kQuads>());
    KT_UNROLL
    for (int v = 0; v < V; ++v) {
      KT_UNROLL
      for (int r = 0; r < R; ++r) total[v][r] = Quad::total(sum[v][r]);
    }
  }

  // Adds such sums, with their scales and offsets, to acc.
  template <int kSet, int V, int R>
  static KT_INLINE void add_set(const AllGroups& groups, const uint8_t* group, int64_t g, int v0,
                                const float* x_scale, const float* x_value, const I (&sum)[V][R],
                                F (&acc)[V][R]) {
    F scale[V];
    groups.template scales<V>(group, kSet, v0, scale);
    KT_UNROLL
    for (int v = 0; v < V; ++v) {
      add_scaled<V, R>(in_units(scale[v]), v, g, x_scale, sum, acc);
    }
    add_offsets<kSet, V, R>(groups, group, g, v0, x_value, acc);
  }
  template <int V, int R>
  static KT_INLINE void add_scaled(F scale, int v, int64_t g, const float* x_scale,
                                   const I (&sum)[V][R], F (&acc)[V][R]) {
    KT_UNROLL
    for (int r = 0; r < R; ++r) {
      const F both = S::mul(scale, S::set1(x_scale[g * R + r]));
      acc[v][r] = S::fma(S::to_f32(sum[v][r]), both, acc[v][r]);
    }
  }
  template <int kSet, int V, int R>
  static KT_INLINE void add_offsets(const AllGroups& groups, const uint8_t* group, int64_t g,
                                    int v0, const float* x_value, F (&acc)[V][R]) {
    if (!groups.has_offsets()) return;
    F offset[V];
    groups.template offsets<V>(group, kSet, v0, offset);
    KT_UNROLL
    for (int v = 0; v < V; ++v) {
      KT_UNROLL
      for (int r = 0; r < R; ++r) {
        const F x = piece_value<S, kSets, R>(x_value, g * kSets + kSet, r);
        acc[v][r] = S::fma(offset[v], x, acc[v][r]);
      }
    }
  }

  template <int kFirst, int V, int R, int... Q>
  static KT_INLINE void add_quads(typename Code::template Quad<R>::Sum (&sum)[V][R],
                                  I (&units)[V][Code::kUnits], const uint8_t* w, I levels,
                                  const uint8_t* a, Prefetch prefetch,
                                  std::integer_sequence<int, Q...>) {
    (add_quad<kFirst + Q, V, R>(sum, units, w, levels, a, prefetch), ...);
  }

  template <int Q, int V, int R>
  static KT_INLINE void add_quad(typename Code::template Quad<R>::Sum (&sum)[V][R],
                                 I (&units)[V][Code::kUnits], const uint8_t* w, I levels,
                                 const uint8_t* a, Prefetch prefetch) {
    using Quad = typename Code::template Quad<R>;
    typename Quad::Weights weight[V];
    KT_UNROLL
    for (int v = 0; v < V; ++v) {
      Code::template read<Q, true>(units[v], w + v * S::kLanes * 4, prefetch);
    }
    KT_UNROLL
    for (int v = 0; v < V; ++v) {
      weight[v] = Code::template widen<Quad, Q>(units[v], levels);
    }
    Quad::template add<V, R>(sum, weight, a + 2 * Q * R * 4);
  }
};

}  // namespace ktcore::KTCORE_ISA
