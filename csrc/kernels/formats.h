// The dot products of one block (32 weight rows) with tiles of R activation rows, for each weight
// format, in two ways that give the same bits:
//
//   dot      widens the packed block in registers, once for each tile: for few tiles, bound by memory
//   expand   widens a piece of the block into a panel in the first-level cache, which Panel::dot then
//            multiplies with tile after tile: for many, bound by the dot-product units
//
// Both add a range of a block's groups to sums in memory; those of a format that `kOverwrites` do not read them
// for the first range.
//
// Every output is summed in the order of the columns in one lane, whatever R is and whichever way is
// taken, so a token's result does not depend on which tokens share its batch.
//
// The loops are functions of their own: inlined into their callers, compilers run out of registers.
//
// `Fine` is the format's struct for tokens whose activations its own codec would change too much.
//
// Adding a layout: a struct like these, and a line in table.inl.
#pragma once

namespace ktcore::KTCORE_ISA {

// How many of a block's vectors to compute at once: all of them while the sums fit in registers, so
// that memory is read in one pass and broadcasts are shared.
template <class S>
static constexpr int vectors_at_once(int rows, int cells) {
  int v = static_cast<int>(kBlockRows) / S::kLanes;
  while (v > 1 && v * rows > cells) v /= 2;
  return v;
}

// Row r's activations summed over a piece of kPieces a group: as the integers that stand for them, and
// their values, which the weights' offsets multiply.
template <int kPieces, int R>
static KT_INLINE int32_t piece_sum(const int32_t* sums, int64_t piece, int r) {
  if constexpr (kPieces == 2) return sums[piece * R + r];
  return sums[2 * piece * R + r] + sums[(2 * piece + 1) * R + r];
}
template <class S, int kPieces, int R>
static KT_INLINE typename S::F piece_value(const float* values, int64_t piece, int r) {
  if constexpr (kPieces == 2) return S::set1(values[piece * R + r]);
  return S::add(S::set1(values[2 * piece * R + r]), S::set1(values[(2 * piece + 1) * R + r]));
}

// sum + a * b. As an intrinsic, GCC lets the sum change its register, and moves whole tiles of sums to
// and from memory.
template <class S>
static KT_INLINE typename S::F add_product(typename S::F sum, typename S::F a, typename S::F b) {
#if defined(KT_ASM)
  __asm__("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
#else
  return S::fma(a, b, sum);
#endif
}

// Asks for what will be read later: soon after `p` into the first-level cache, still later into the second.
template <class S>
static KT_INLINE void ask_ahead(const uint8_t* p, Prefetch bytes) {
  S::prefetch(p + bytes.first_level);
  S::prefetch_l2(p + bytes.second_level);
}

// V vectors of units, and asks for what will be read later.
template <class S, int V>
static KT_INLINE void load_units(typename S::I (&raw)[V], const uint8_t* w, Prefetch prefetch) {
  KT_UNROLL
  for (int v = 0; v < V; ++v) {
    const uint8_t* p = w + v * S::kLanes * 4;
    ask_ahead<S>(p, prefetch);
    raw[v] = S::load_i(p);
  }
}

// Groups [first, first + count) of the `groups` of a block.
struct Range {
  int64_t first, count, groups;
};

// One group of 32 columns is 16 pairs; a panel holds kPanelGroups groups: [pair][32 rows] of 16-bit
// pairs, 16 KiB, which leaves the rest of a first-level cache to a tile of activations.
static constexpr int64_t kPanelGroups = 8;

// Whether outer scales multiply the sums of a panel's columns instead of each group's: where they are the
// panel's own, and the sums are of nothing else.
static inline bool scaled_last(const WeightLayout& layout) {
  return layout.folded() && layout.span % kPanelGroups == 0 && !layout.offsets &&
         !layout.inner_offsets;
}

// What is to come from memory into the second-level cache while a panel, or a range of a packed block, is
// multiplied with several tiles: so many lines for each group. At once they would hold up the loads of the
// activations. Where a processor fetches lines in pairs, every second one is asked for: each holds a fill
// buffer until it is there.
template <class S>
struct Ahead {
  const uint8_t* at;
  int64_t lines, step_lines;
  KT_INLINE void step() {
    for (int64_t line = 0; line < lines; line += step_lines) S::prefetch_l2(at + line * 64);
    at += lines * 64;
  }
};

// Asks for the activations of the group that comes kLater, here or in the tile behind this one, as a panel's columns of
// a tile are too few for a processor to foresee where the next tile's are.
template <class S, class Codec, int R, int kLater>
static KT_INLINE void ask_items(const uint8_t* tile, const Range& range, int64_t group) {
  constexpr int64_t kBytes = Codec::kItemBytes * R;
  const uint8_t* items = tile + (range.first + group + kLater) * kBytes;
  if (group + kLater >= range.count) {
    items += R * Codec::row_bytes(range.groups * kGroup) - range.count * kBytes;
  }
  KT_UNROLL
  for (int64_t at = 0; at < kBytes; at += 64) S::prefetch(items + at);
}

// The sums of V vectors from v0 on, of every row, between registers and `out` [R][32].
template <class S, int V, int R>
static KT_INLINE void load_sums(typename S::F (&sum)[V][R], const float* out, int v0) {
  KT_UNROLL
  for (int v = 0; v < V; ++v) {
    KT_UNROLL
    for (int r = 0; r < R; ++r) sum[v][r] = S::load(out + r * kBlockRows + (v0 + v) * S::kLanes);
  }
}
template <class S, int V, int R>
static KT_INLINE void store_sums(const typename S::F (&sum)[V][R], float* out, int v0) {
  KT_UNROLL
  for (int v = 0; v < V; ++v) {
    KT_UNROLL
    for (int r = 0; r < R; ++r) S::store(out + r * kBlockRows + (v0 + v) * S::kLanes, sum[v][r]);
  }
}

template <class S, int V, int R>
static KT_INLINE void clear_sums(typename S::F (&sum)[V][R]) {
  KT_UNROLL
  for (int v = 0; v < V; ++v) {
    KT_UNROLL
    for (int r = 0; r < R; ++r) sum[v][r] = S::zero();
  }
}
template <class S, int V, int R>
static KT_INLINE void clear_sums(typename S::I (&sum)[V][R]) {
  KT_UNROLL
  for (int v = 0; v < V; ++v) {
    KT_UNROLL
    for (int r = 0; r < R; ++r) sum[v][r] = S::zero_i();
  }
}
// The sums that a range adds to: none before the first.
template <class S, int V, int R>
static KT_INLINE void begin_sums(const Range& range, typename S::F (&sum)[V][R], const float* out,
                                 int v0) {
  if (range.first == 0) {
    clear_sums<S>(sum);
  } else {
    load_sums<S>(sum, out, v0);
  }
}
// Adds a piece's sums to `out`: their multiples, where they are of scaled weights.
template <class S, bool kScaled, int V, int R>
static KT_INLINE void add_piece(const typename S::F (&sum)[V][R], const typename S::F (&factor)[V],
                                float* out, int v0) {
  KT_UNROLL
  for (int v = 0; v < V; ++v) {
    KT_UNROLL
    for (int r = 0; r < R; ++r) {
      float* to = out + r * kBlockRows + (v0 + v) * S::kLanes;
      if constexpr (kScaled) {
        S::store(to, S::fma(sum[v][r], factor[v], S::load(to)));
      } else {
        S::store(to, S::add(sum[v][r], S::load(to)));
      }
    }
  }
}

// Groups of a piece of scaled floats: four, or as many of these as evenly share a scale.
static inline int64_t piece_groups(const WeightLayout& layout) {
  if (layout.span % 4 == 0) return 4;
  return layout.span % 2 == 0 ? 2 : 1;
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

// Multiplies the sums of a block's rows, of `rows` activations, by these rows' scales.
template <class S>
static KT_INLINE void scale_rows(const uint8_t* scales, float* out, int64_t rows) {
  for (int v = 0; v < kBlockRows; v += S::kLanes) {
    const typename S::F scale = S::load(reinterpret_cast<const float*>(scales) + v);
    for (int64_t r = 0; r < rows; ++r) {
      float* to = out + r * kBlockRows + v;
      S::store(to, S::mul(S::load(to), scale));
    }
  }
}

template <class S>
struct Int8Channel {
  using Fine = Int8Channel;
  using Codec = Int16Codec<S>;
  using Panel = Int16Panel<S, 0>;
  static constexpr int kMaxRows = S::kIntRows;
  static constexpr int kDirectTiles = 2, kDirectRows = S::kByteRows;
  static constexpr bool kOverwrites = false;
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

  static KT_INLINE void finish(const uint8_t* block, int64_t groups, float* out, int64_t rows) {
    scale_rows<S>(block + groups * kGroupBytes, out, rows);
  }
};

// Goes through a block's groups: where each is, and its scales and offsets, of up to kSets sets, as
// floats. See packed.h for how they lie and combine.
template <class S, int kSets>
class Groups {
 public:
  KT_INLINE Groups(const WeightLayout& layout, int64_t code_bytes, const uint8_t* block)
      : layout_(layout),
        code_bytes_(code_bytes),
        both_sets_(layout.outer_sets() == 2),
        block_(block),
        group_bytes_(layout.group_bytes()),
        inner_bytes_(layout.inner_bytes()),
        outer_bytes_(layout.outer_bytes()) {}

  KT_INLINE bool has_offsets() const { return layout_.offsets || layout_.inner_offsets; }
  // Whether the next group has other outer scales.
  KT_INLINE bool ends_span() const { return left_ == 1; }

  // Goes to group g, or to the next one, and makes the outer scales of V vectors from v0 on ready.
  template <int V>
  KT_INLINE const uint8_t* begin(int64_t g, int v0) {
    left_ = layout_.span - g % layout_.span;
    group_ = block_ + layout_.group_at(g);
    convert<V>(block_ + layout_.outer_at(g), v0);
    return group_;
  }
  template <int V>
  KT_INLINE const uint8_t* next(int v0) {
    group_ += group_bytes_;
    if (--left_ > 0) return group_;
    left_ = layout_.span;
    const uint8_t* outer = kSets == 2 ? group_ - inner_bytes_ : group_;
    group_ += outer_bytes_;
    convert<V>(outer, v0);
    return group_;
  }

  // Of vector v of a set, the outer factor alone.
  KT_INLINE typename S::F outer(int set, int v) const {
    return S::load(scale_[both_sets_ ? set : 0] + v * S::kLanes);
  }
  // The scales and offsets of a group's set: of V vectors from v0 on, or of one.
  template <int V>
  KT_INLINE void scales(const uint8_t* group, int set, int v0, typename S::F (&to)[V]) const {
    KT_UNROLL
    for (int v = 0; v < V; ++v) to[v] = outer(set, v0 + v);
    if (!layout_.inner_scales) return;
    KT_UNROLL
    for (int v = 0; v < V; ++v) to[v] = S::mul(to[v], S::to_f32(inner(group, set, v0 + v)));
  }
  template <int V>
  KT_INLINE void offsets(const uint8_t* group, int set, int v0, typename S::F (&to)[V]) const {
    const float* from = (layout_.offsets ? offset_ : scale_)[both_sets_ ? set : 0];
    KT_UNROLL
    for (int v = 0; v < V; ++v) to[v] = S::load(from + (v0 + v) * S::kLanes);
    if (!layout_.inner_offsets) return;
    const int at = layout_.inner_scales ? kSets + set : set;
    KT_UNROLL
    for (int v = 0; v < V; ++v) to[v] = S::mul(to[v], S::to_f32(inner(group, at, v0 + v)));
  }
  KT_INLINE typename S::F scale(const uint8_t* group, int set, int v) const {
    typename S::F of_vector[1];
    scales<1>(group, set, v, of_vector);
    return of_vector[0];
  }
  KT_INLINE typename S::F offset(const uint8_t* group, int set, int v) const {
    typename S::F of_vector[1];
    offsets<1>(group, set, v, of_vector);
    return of_vector[0];
  }
  // Of a set's inner scales or, behind them, inner offsets.
  KT_INLINE typename S::I inner(const uint8_t* group, int set, int v) const {
    const uint8_t* first = kSets == 2 ? group - inner_bytes_ : group + code_bytes_;
    return S::load_i8(first + set * kBlockRows + v * S::kLanes);
  }

 private:
  template <int V>
  KT_INLINE void convert(const uint8_t* p, int v0) {
    convert_set<V>(p, v0, scale_[0]);
    if (kSets == 2 && both_sets_) convert_set<V>(p + layout_.set_bytes(), v0, scale_[kSecond]);
    if (!layout_.offsets) return;
    p += layout_.outer_sets() * layout_.set_bytes();
    convert_set<V>(p, v0, offset_[0]);
    if (kSets == 2 && both_sets_) convert_set<V>(p + layout_.set_bytes(), v0, offset_[kSecond]);
  }
  template <int V>
  KT_INLINE void convert_set(const uint8_t* p, int v0, float* to) const {
    for (int v = v0; v < v0 + V; ++v) {
      const int64_t at = v * S::kLanes;
      const auto* half = reinterpret_cast<const uint16_t*>(p) + at;
      S::store(to + at, layout_.scale_type == DType::f32
                            ? S::load(reinterpret_cast<const float*>(p) + at)
                        : layout_.scale_type == DType::f16 ? S::load_f16(half)
                                                           : S::load_bf16(half));
    }
  }

  static constexpr int kSecond = kSets == 2 ? 1 : 0;
  const WeightLayout& layout_;
  const int64_t code_bytes_;
  const bool both_sets_;
  const uint8_t* block_;
  const int64_t group_bytes_, inner_bytes_, outer_bytes_;
  const uint8_t* group_ = nullptr;
  int64_t left_ = 0;  // groups that have the outer scales at hand, this one included
  alignas(64) float scale_[kSets == 2 ? 2 : 1][kBlockRows];
  alignas(64) float offset_[kSets == 2 ? 2 : 1][kBlockRows];
};

// Codes of kBits bits or, with kTable, of 16 levels: four columns (a quad) are taken out of the bytes of a
// lane at a time. Those of 3, 5 and 6 bits are in two parts: the lower 2 or 4 bits in units of their own, the
// upper ones in others.
template <class S, int kBits, bool kTable>
struct Codes {
  using I = typename S::I;
  static constexpr CodeParts kParts = CodeParts::of(kBits);
  static constexpr int kLow = kParts.low, kHigh = kParts.high;
  static constexpr bool kPairs = false;                  // of columns 0 and 1, 2 and 3
  static constexpr bool kBiased = !kTable && kBits < 8;  // as 16 bits
  static constexpr float kUnit = 1;
  template <int R>
  using Quad = Quads<S, R>;
  // A bit of each of 32 columns and 32 rows is one unit.
  static constexpr int64_t kBytes = kBits * kUnitBytes;  // of a group
  // How many quads share the bytes of a unit.
  static constexpr int kLowQuads = 8 / kLow, kHighQuads = kHigh == 0 ? 8 : 8 / kHigh;

  // What all codes are larger by than the weights they stand for.
  template <class Quad>
  static KT_INLINE int32_t bias(const WeightLayout& layout) {
    return kTable || kBits == 8 ? Quad::kByteBias : layout.bias;
  }
  // Quad Q of a group out of the units that hold its lower and upper bits.
  template <class Quad, int Q>
  static KT_INLINE typename Quad::Weights widen(I low, I high, I levels) {
    constexpr int kAt = Q % kLowQuads * kLow, kHighAt = kHigh == 0 ? 0 : Q % kHighQuads * kHigh;
    if constexpr (kTable) {
      return Quad::of_levels(levels, Q % 2 == 0 ? S::low_nibbles(low) : S::high_nibbles(low));
    } else if constexpr (kBits == 8) {
      return Quad::of_bytes(low);
    } else {
      return Quad::template of_codes<kAt, kLow, kHighAt, kHigh>(low, high);
    }
  }
};

// e4m3 (OCP 8-bit floating point, OFP8), whose bits are s eee | e mmm, as 16-bit integers in units of 1/32: products of
// (8 + mmm) << e, times 2^10, and +-4^eee, cut to their upper bits with rounding. What is below a quarter loses some of
// its bits, none of it more than half a unit, which is 0.0035 % of the largest; subnormal numbers come out as zero.
template <class S>
struct F8Codes {
  using I = typename S::I;
  static constexpr CodeParts kParts = CodeParts::of(8);
  static constexpr int kLow = 8, kHigh = 0, kLowQuads = 1, kHighQuads = 8;
  static constexpr bool kPairs = true, kBiased = false;
  static constexpr float kUnit = 1.0f / kF8Multiple;
  static constexpr int64_t kBytes = 8 * kUnitBytes;
  template <int R>
  using Quad = WordQuads<S>;

  template <class>
  static KT_INLINE int32_t bias(const WeightLayout&) {
    return 0;
  }
  template <class, int>
  static KT_INLINE typename WordQuads<S>::Weights widen(I raw, I, I) {
    static constexpr int8_t kMantissa[16] = {32, 36, 40, 44, 48, 52,  56,  60,
                                             64, 72, 80, 88, 96, 104, 112, 120};
    static constexpr int8_t kLower[16] = {1, 4, 16, 64, 0, 0, 0, 0, -1, -4, -16, -64, 0, 0, 0, 0};
    static constexpr int8_t kUpper[16] = {0,  0,  0,  0,  1,  4,  16,  64,
                                          -1, -1, -1, -1, -1, -4, -16, -64};
    const I high = S::high_nibbles(raw),
            mantissa = S::look_up(S::table16(kMantissa), S::low_nibbles(raw));
    const I lower = S::look_up(S::table16(kLower), high),
            upper = S::look_up(S::table16(kUpper), high);
    const I even = S::set1_i16(0x00ff), odd = S::set1_i16(-256);
    return {S::mul_round_i16(S::template shift16<-8>(mantissa),
                             S::and_or(lower, even, S::template shift16<-8>(upper))),
            S::mul_round_i16(S::and_i(mantissa, odd),
                             S::and_or(upper, odd, S::template shift16<8>(lower)))};
  }
};

// Weights as codes, which are integers less the layout's bias or stand for some; kSets sets of scales a group. What
// varies more finely is in the layout.
template <class S, class Code, int kSets>
struct Coded {
  using Fine = Coded;
  using Codec = Int16Codec<S, Code::kPairs>;
  using Panel = Int16Panel<S, kSets>;
  using I = typename S::I;
  using F = typename S::F;
  static constexpr int kMaxRows = S::kIntRows;
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
    Groups<S, kSets> groups(layout, Code::kBytes, block);
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
        // Codes alone are asked for, which is best, but for the scales of 5 and 6 bits: 3 %.
        if constexpr (Code::kLow == 4 && Code::kHigh > 0)
          ask_ahead<S>(group + Code::kBytes, prefetch);
        if constexpr (kSets == 2) {  // before the codes, as a Zen 4 follows ascending lines alone
          S::prefetch(group - 128);
          S::prefetch(group - 64);
        }
        I sum[V][R];
        sum_set<0, V, R>(layout, group, g, v0, levels, a, x_sum, sum, prefetch);
        if constexpr (kSets == 1) {
          add_set<0, V, R>(groups, group, g, v0, x_scale, x_value, sum, acc);
        } else if (!layout.folded()) {
          add_set<0, V, R>(groups, group, g, v0, x_scale, x_value, sum, acc);
          sum_set<1, V, R>(layout, group, g, v0, levels, a, x_sum, sum, prefetch);
          add_set<1, V, R>(groups, group, g, v0, x_scale, x_value, sum, acc);
        } else {
          I other[V][R];
          F factor[V];
          sum_set<1, V, R>(layout, group, g, v0, levels, a, x_sum, other, prefetch);
          KT_UNROLL
          for (int v = 0; v < V; ++v) {
            const I first = groups.inner(group, 0, v0 + v), second = groups.inner(group, 1, v0 + v);
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
    Groups<S, kSets> groups(layout, Code::kBytes, block);
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
          const I factors[] = {S::twice16(groups.inner(group, 0, v)),
                               S::twice16(groups.inner(group, kSets - 1, v))};
          expand_quads<true>(group + at, levels, bias, factors, to + at, Numbers<8>());
          S::store(panel.scales + g * kBlockRows + lanes, groups.outer(0, v));
        } else {
          expand_quads<false>(group + at, levels, bias, nullptr, to + at, Numbers<8>());
        }
        for (int set = 0; set < kSets; ++set) {
          const int64_t place = (g * kSets + set) * kBlockRows + lanes;
          if (!panel.folded) {
            S::store(panel.scales + place,
                     S::mul(groups.scale(group, set, v), S::set1(Code::kUnit)));
          }
          if (panel.has_offsets) S::store(panel.offsets + place, groups.offset(group, set, v));
        }
      }
    }
  }

  static KT_INLINE void finish(const uint8_t*, int64_t, float*, int64_t) {}

 private:
  template <int N>
  using Numbers = std::make_integer_sequence<int, N>;

  // Times each set's factors, if kFolded.
  template <bool kFolded, int... Q>
  static KT_INLINE void expand_quads(const uint8_t* from, I levels, I bias, const I* factors,
                                     uint8_t* to, std::integer_sequence<int, Q...>) {
    (expand_quad<kFolded, Q>(from, levels, bias, factors, to), ...);
  }
  template <bool kFolded, int Q>
  static KT_INLINE void expand_quad(const uint8_t* from, I levels, I bias, const I* factors,
                                    uint8_t* to) {
    const I low = S::load_i(from + Code::kParts.low_unit(Q) * kUnitBytes);
    I high = low;
    if constexpr (Code::kHigh > 0) high = S::load_i(from + Code::kParts.high_unit(Q) * kUnitBytes);
    auto weights = Code::template widen<WordQuads<S>, Q>(low, high, levels);
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
                                I levels, const uint8_t* a, const int32_t* x_sum, I (&total)[V][R],
                                Prefetch prefetch) {
    using Quad = typename Code::template Quad<R>;
    constexpr int kQuads = 8 / kSets;
    I low[V], high[V];
    typename Quad::Sum sum[V][R];
    KT_UNROLL
    for (int r = 0; r < R; ++r) {
      const int32_t of_columns = piece_sum<kSets, R>(x_sum, g * kSets + kSet, r);
      const I start = S::set1_i32(-Code::template bias<Quad>(layout) * of_columns);
      KT_UNROLL
      for (int v = 0; v < V; ++v) sum[v][r] = Quad::start(start);
    }
    add_quads<kSet * kQuads, V, R>(sum, low, high, group + v0 * S::kLanes * 4, levels, a, prefetch,
                                   Numbers<kQuads>());
    KT_UNROLL
    for (int v = 0; v < V; ++v) {
      KT_UNROLL
      for (int r = 0; r < R; ++r) total[v][r] = Quad::total(sum[v][r]);
    }
  }

  // Adds such sums, with their scales and offsets, to acc.
  template <int kSet, int V, int R>
  static KT_INLINE void add_set(const Groups<S, kSets>& groups, const uint8_t* group, int64_t g,
                                int v0, const float* x_scale, const float* x_value,
                                const I (&sum)[V][R], F (&acc)[V][R]) {
    F scale[V];
    groups.template scales<V>(group, kSet, v0, scale);
    KT_UNROLL
    for (int v = 0; v < V; ++v) {
      if constexpr (Code::kUnit != 1) scale[v] = S::mul(scale[v], S::set1(Code::kUnit));
      add_scaled<V, R>(scale[v], v, g, x_scale, sum, acc);
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
  static KT_INLINE void add_offsets(const Groups<S, kSets>& groups, const uint8_t* group, int64_t g,
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
  static KT_INLINE void add_quads(typename Code::template Quad<R>::Sum (&sum)[V][R], I (&low)[V],
                                  I (&high)[V], const uint8_t* w, I levels, const uint8_t* a,
                                  Prefetch prefetch, std::integer_sequence<int, Q...>) {
    (add_quad<kFirst + Q, Q == 0, V, R>(sum, low, high, w, levels, a, prefetch), ...);
  }

  template <int Q, bool kIsFirst, int V, int R>
  static KT_INLINE void add_quad(typename Code::template Quad<R>::Sum (&sum)[V][R], I (&low)[V],
                                 I (&high)[V], const uint8_t* w, I levels, const uint8_t* a,
                                 Prefetch prefetch) {
    using Quad = typename Code::template Quad<R>;
    if constexpr (Q % Code::kLowQuads == 0) {
      load_units<S, V>(low, w + Code::kParts.low_unit(Q) * kUnitBytes, prefetch);
    }
    if constexpr (Code::kHigh > 0 && (Q % Code::kHighQuads == 0 || kIsFirst)) {
      load_units<S, V>(high, w + Code::kParts.high_unit(Q) * kUnitBytes, prefetch);
    }
    typename Quad::Weights weight[V];
    KT_UNROLL
    for (int v = 0; v < V; ++v) {
      weight[v] = Code::template widen<Quad, Q>(low[v], Code::kHigh > 0 ? high[v] : low[v], levels);
    }
    Quad::template add<V, R>(sum, weight, a + 2 * Q * R * 4);
  }
};

// Where floating-point weights come from: kColumns columns at a time from kBytes bytes, as floats.
// `column<I>` is rows [row, row + kLanes) of one of them.

template <class S>
struct FromBf16 {
  static constexpr int kColumns = 2;
  static constexpr int64_t kBytes = kUnitBytes;
  static constexpr bool kScaled = false;
  template <int I>
  static KT_INLINE typename S::F column(const uint8_t* from, int64_t row) {
    const typename S::I raw = S::load_i(from + row * 4);
    return I == 0 ? S::low_bf16(raw) : S::high_bf16(raw);
  }
};

template <class S>
struct FromF16 {
  static constexpr int kColumns = 2;
  static constexpr int64_t kBytes = kUnitBytes;
  static constexpr bool kScaled = false;
  template <int I>
  static KT_INLINE typename S::F column(const uint8_t* from, int64_t row) {
    return S::load_f16(reinterpret_cast<const uint16_t*>(from) + I * kBlockRows + row);
  }
};

template <class S>
struct FromF32 {
  static constexpr int kColumns = 2;
  static constexpr int64_t kBytes = 2 * kUnitBytes;
  static constexpr bool kScaled = false;
  template <int I>
  static KT_INLINE typename S::F column(const uint8_t* from, int64_t row) {
    return S::load(reinterpret_cast<const float*>(from) + I * kBlockRows + row);
  }
};

template <class S>
struct FromF8 {
  static constexpr int kColumns = 4;
  static constexpr int64_t kBytes = kUnitBytes;
  static constexpr bool kScaled = true;
  template <int I>
  static KT_INLINE typename S::F column(const uint8_t* from, int64_t row) {
    return S::template e4m3<I % 2 * 2 + I / 2>(S::load_i(from + row * 4));
  }
};

// bf16 weights as integers of 16 bits, so many to the largest of a row, which are made as a block is read; activations of 16
// bits. The rows' scales are behind the groups: NaN for a row that is not finite.
template <class S>
struct Bf16Words {
  using Fine = Bf16Words;
  using Codec = Int16Codec<S, true>;
  using Panel = Int16Panel<S, 0>;
  using F = typename S::F;
  using I = typename S::I;
  static constexpr int kMaxRows = S::kIntRows;
  static constexpr int kDirectTiles = 2, kDirectRows = 0;
  static constexpr bool kOverwrites = false;
  static constexpr int kPairs = static_cast<int>(kGroup) / 2;
  static constexpr int64_t kGroupBytes = kPairs * kUnitBytes;

  template <int R>
  KT_NOINLINE static void dot(const WeightLayout&, const uint8_t* block, const Range& range,
                              const uint8_t* tile, float* out, const Prefetch& prefetch,
                              const Ahead<S>& ahead) {
    Ahead<S> coming = ahead;
    constexpr int V = vectors_at_once<S>(R, S::kIntCells);
    const float* x_scale = Codec::scales(tile, R, range.groups) + range.first * R;
    for (int v0 = 0; v0 < static_cast<int>(kBlockRows) / S::kLanes; v0 += V) {
      F acc[V][R], multiple[V];
      load_sums<S>(acc, out, v0);
      load_multiples<V>(block + range.groups * kGroupBytes, v0, multiple);
      const uint8_t* x = tile + range.first * Codec::kItemBytes * R;
      const uint8_t* w = block + range.first * kGroupBytes + v0 * S::kLanes * 4;
      for (int64_t g = 0; g < range.count; ++g) {
        if (v0 == 0) coming.step();
        I sum[V][R];
        clear_sums<S>(sum);
        for (int round = 0; round < kPairs / 4; ++round) {
          KT_UNROLL
          for (int pair = 0; pair < 4; ++pair, w += kUnitBytes, x += 4 * R) {
            I weight[V];
            KT_UNROLL
            for (int v = 0; v < V; ++v) {
              const uint8_t* p = w + v * S::kLanes * 4;
              ask_ahead<S>(p, prefetch);
              weight[v] = words(p, multiple[v]);
            }
            KT_UNROLL
            for (int r = 0; r < R; ++r) {
              const I item = S::broadcast4(x + r * 4);
              KT_UNROLL
              for (int v = 0; v < V; ++v) sum[v][r] = S::dot_i16(sum[v][r], weight[v], item);
            }
          }
        }
        KT_UNROLL
        for (int r = 0; r < R; ++r) {
          const F scale = S::set1(x_scale[g * R + r]);
          KT_UNROLL
          for (int v = 0; v < V; ++v) {
            acc[v][r] = S::fma(S::to_f32(sum[v][r]), scale, acc[v][r]);
          }
        }
      }
      store_sums<S>(acc, out, v0);
    }
  }

  KT_NOINLINE static void expand(const WeightLayout&, const uint8_t* block, const Range& range,
                                 Panel& panel) {
    constexpr int kVectors = static_cast<int>(kBlockRows) / S::kLanes;
    F multiple[kVectors];
    load_multiples<kVectors>(block + range.groups * kGroupBytes, 0, multiple);
    const uint8_t* w = block + range.first * kGroupBytes;
    uint8_t* to = panel.weights;
    for (int64_t unit = 0; unit < range.count * kPairs; ++unit, w += kUnitBytes, to += kUnitBytes) {
      for (int v = 0; v < kVectors; ++v) {
        S::store_i(to + v * S::kLanes * 4, words(w + v * S::kLanes * 4, multiple[v]));
      }
    }
  }

  static KT_INLINE void finish(const uint8_t* block, int64_t groups, float* out, int64_t rows) {
    scale_rows<S>(block + groups * kGroupBytes, out, rows);
  }

 private:
  // What a row's numbers are multiplied by: one over its scale. Where that is 0 or NaN the integers do not matter, as
  // it multiplies their sums.
  template <int V>
  static KT_INLINE void load_multiples(const uint8_t* scales, int v0, F (&multiple)[V]) {
    KT_UNROLL
    for (int v = 0; v < V; ++v) {
      const F scale = S::load(reinterpret_cast<const float*>(scales) + (v0 + v) * S::kLanes);
      multiple[v] = S::div(S::set1(1), S::max(scale, S::set1(1e-36f)));
    }
  }
  // Two columns of a vector of rows. In a float of this size the lower bits are an integer.
  static KT_INLINE I words(const uint8_t* pairs, F multiple) {
    const F size = S::set1(0x1.8p23f);
    const F even = S::fma(FromBf16<S>::template column<0>(pairs, 0), multiple, size);
    const F odd = S::fma(FromBf16<S>::template column<1>(pairs, 0), multiple, size);
    return S::pair16(S::bits(even), S::bits(odd));
  }
};

// Floating-point weights and float32 activations. Sums run over pieces of up to four groups: that is
// more exact than one long sum, and a piece has one scale.
template <class S, class From>
struct Floats {
  using Fine = Floats;
  using Codec = FloatCodec<S>;
  using F = typename S::F;
  static constexpr int kMaxRows = S::kFloatRows;
  static constexpr int kDirectTiles = From::kScaled ? 2 : 4, kDirectRows = 0;
  static constexpr bool kOverwrites = false;
  static constexpr int64_t kGroupBytes = kGroup / From::kColumns * From::kBytes;

  // The columns of a panel as floats, [column][32 rows], and the scales of its pieces.
  struct Panel {
    static constexpr int64_t kGroups = 4;
    alignas(64) float weights[kGroups * kGroup * kBlockRows];
    alignas(64) float scales[kGroups * kBlockRows];
    int64_t piece_groups = kGroups;

    template <int R>
    KT_NOINLINE void dot(const Range& range, const uint8_t* tile, float* out,
                         const Ahead<S>& ahead) const {
      Ahead<S> coming = ahead;
      constexpr int V = vectors_at_once<S>(R, S::kFloatCells);
      for (int v0 = 0; v0 < static_cast<int>(kBlockRows) / S::kLanes; v0 += V) {
        const auto* x = reinterpret_cast<const float*>(tile) + range.first * kGroup * R;
        const float* w = weights + v0 * S::kLanes;
        const float* scale = scales + v0 * S::kLanes;
        for (int64_t left = range.count; left > 0; left -= piece_groups, scale += kBlockRows) {
          const int64_t columns = (left < piece_groups ? left : piece_groups) * kGroup;
          F sum[V][R];
          clear_sums<S>(sum);
          for (int64_t pair = 0; pair < columns / 2; ++pair, x += 2 * R) {
            if (v0 == 0 && pair % 16 == 0) {
              coming.step();
              ask_items<S, Codec, R, 1>(tile, range, range.count - left + pair / 16);
            }
            KT_UNROLL
            for (int i = 0; i < 2; ++i, w += kBlockRows) {
              F weight[V];
              KT_UNROLL
              for (int v = 0; v < V; ++v) {
                weight[v] = S::load(w + v * S::kLanes);
                if constexpr (R > 1) KT_IN_REGISTER(weight[v]);
              }
              add_column<V, R>(sum, weight, x + i);
            }
          }
          F factor[V];
          KT_UNROLL
          for (int v = 0; v < V; ++v) factor[v] = S::load(scale + v * S::kLanes);
          add_piece<S, From::kScaled>(sum, factor, out, v0);
        }
      }
    }
  };

  template <int R>
  KT_NOINLINE static void dot(const WeightLayout& layout, const uint8_t* block, const Range& range,
                              const uint8_t* tile, float* out, const Prefetch& prefetch,
                              const Ahead<S>& ahead) {
    Ahead<S> coming = ahead;
    constexpr int V = vectors_at_once<S>(R, S::kFloatCells);
    const int64_t step = From::kScaled ? piece_groups(layout) : 4, last = range.first + range.count;
    Groups<S, 1> groups(layout, kGroupBytes, block);
    for (int v0 = 0; v0 < static_cast<int>(kBlockRows) / S::kLanes; v0 += V) {
      const auto* x = reinterpret_cast<const float*>(tile) + range.first * kGroup * R;
      for (int64_t first = range.first; first < last; first += step) {
        F sum[V][R], factor[V];
        clear_sums<S>(sum);
        const uint8_t* w = block + first * kGroupBytes;
        if constexpr (From::kScaled) {
          w = groups.template begin<V>(first, v0);
          KT_UNROLL
          for (int v = 0; v < V; ++v) factor[v] = groups.outer(0, v0 + v);
        }
        const int64_t end = first + step < last ? first + step : last;
        for (int64_t g = first; g < end; ++g) {
          if (v0 == 0) coming.step();
          for (int64_t k = 0; k < kGroup; k += From::kColumns, w += From::kBytes) {
            add_columns<V, R>(sum, w, v0, x, prefetch,
                              std::make_integer_sequence<int, From::kColumns>());
            x += From::kColumns * R;
          }
        }
        add_piece<S, From::kScaled>(sum, factor, out, v0);
      }
    }
  }

  KT_NOINLINE static void expand(const WeightLayout& layout, const uint8_t* block,
                                 const Range& range, Panel& panel) {
    constexpr int kVectors = static_cast<int>(kBlockRows) / S::kLanes;
    Groups<S, 1> groups(layout, kGroupBytes, block);
    panel.piece_groups = From::kScaled ? piece_groups(layout) : Panel::kGroups;
    float* to = panel.weights;
    for (int64_t g = 0; g < range.count; ++g) {
      const uint8_t* w = block + (range.first + g) * kGroupBytes;
      if constexpr (From::kScaled) {
        w = groups.template begin<kVectors>(range.first + g, 0);
        for (int v = 0; v < kVectors; ++v) {
          S::store(panel.scales + g / panel.piece_groups * kBlockRows + v * S::kLanes,
                   groups.outer(0, v));
        }
      }
      for (int64_t k = 0; k < kGroup; k += From::kColumns, w += From::kBytes) {
        expand_columns(w, to, std::make_integer_sequence<int, From::kColumns>());
        to += From::kColumns * kBlockRows;
      }
    }
  }

  static KT_INLINE void finish(const uint8_t*, int64_t, float*, int64_t) {}

 private:
  // `x` is the first row's value; those of a row lie in pairs.
  template <int V, int R>
  static KT_INLINE void add_column(F (&sum)[V][R], const F (&weight)[V], const float* x) {
    KT_UNROLL
    for (int r = 0; r < R; ++r) {
      const F value = S::set1(x[2 * r]);
      KT_UNROLL
      for (int v = 0; v < V; ++v) sum[v][r] = add_product<S>(sum[v][r], weight[v], value);
    }
  }

  template <int V, int R, int... I>
  static KT_INLINE void add_columns(F (&sum)[V][R], const uint8_t* w, int v0, const float* x,
                                    Prefetch prefetch, std::integer_sequence<int, I...>) {
    for (int64_t at = 0; at < From::kBytes; at += 64) ask_ahead<S>(w + at, prefetch);
    (add_one<I, V, R>(sum, w, v0, x + I / 2 * 2 * R + I % 2), ...);
  }
  template <int I, int V, int R>
  static KT_INLINE void add_one(F (&sum)[V][R], const uint8_t* w, int v0, const float* x) {
    F weight[V];
    KT_UNROLL
    for (int v = 0; v < V; ++v) weight[v] = From::template column<I>(w, (v0 + v) * S::kLanes);
    add_column<V, R>(sum, weight, x);
  }

  template <int... I>
  static KT_INLINE void expand_columns(const uint8_t* w, float* to,
                                       std::integer_sequence<int, I...>) {
    for (int64_t row = 0; row < kBlockRows; row += S::kLanes) {
      (S::store(to + I * kBlockRows + row, From::template column<I>(w, row)), ...);
    }
  }
};

// Where bf16 weights for dot-product instructions come from: kPairs pairs of columns at a time from a unit.
// `pair<I>` is rows [row, row + kLanes) of one of them.

template <class S>
struct PairsFromBf16 {
  static constexpr int kPairs = 1;
  static constexpr bool kScaled = false;
  template <int I>
  static KT_INLINE typename S::I pair(const uint8_t* from, int64_t row) {
    return S::load_i(from + row * 4);
  }
};

template <class S>
struct PairsFromF8 {
  static constexpr int kPairs = 2;
  static constexpr bool kScaled = true;
  template <int I>
  static KT_INLINE typename S::I pair(const uint8_t* from, int64_t row) {
    return S::template e4m3_pair<I>(S::load_i(from + row * 4));
  }
};

// Dot products of bf16, always with the packed block: that is a panel itself, or costs 3.5 operations to widen
// for each vector, beside a tile's 12 dot products. Sums of scaled weights run over pieces, as in Floats.
template <class S, class From>
struct Bf16Pairs {
  using Fine = Bf16Pairs;
  using Codec = Bf16Codec<S>;
  static constexpr int kMaxRows = S::kFloatRows;
  static constexpr int kDirectTiles = std::numeric_limits<int>::max(), kDirectRows = 0;
  static constexpr bool kOverwrites = false;
  static constexpr int64_t kGroupBytes = kGroup / 2 / From::kPairs * kUnitBytes;

  template <int R>
  KT_NOINLINE static void dot(const WeightLayout& layout, const uint8_t* block, const Range& range,
                              const uint8_t* tile, float* out, const Prefetch& prefetch,
                              const Ahead<S>& ahead) {
    Ahead<S> coming = ahead;
    constexpr int V = vectors_at_once<S>(R, S::kFloatCells);
    const int64_t step = From::kScaled ? piece_groups(layout) : range.count;
    const int64_t last = range.first + range.count;
    Groups<S, 1> groups(layout, kGroupBytes, block);
    for (int v0 = 0; v0 < static_cast<int>(kBlockRows) / S::kLanes; v0 += V) {
      const uint8_t* x = tile + range.first * (kGroup / 2) * Codec::kPairBytes * R;
      for (int64_t first = range.first; first < last; first += step) {
        const int64_t count = last - first < step ? last - first : step;
        const uint8_t* w = block + first * kGroupBytes;
        typename S::F sum[V][R], factor[V];
        if constexpr (From::kScaled) {
          clear_sums<S>(sum);
          w = groups.template begin<V>(first, v0);
          KT_UNROLL
          for (int v = 0; v < V; ++v) factor[v] = groups.outer(0, v0 + v);
        } else {
          load_sums<S>(sum, out, v0);
        }
        for (int64_t g = 0; g < count; ++g) {
          // Where codes are widened this takes registers, and 3 % more time than it saves.
          if constexpr (!From::kScaled) {
            if (v0 == 0) coming.step();
          }
          for (int64_t at = 0; at < kGroupBytes; at += kUnitBytes, w += kUnitBytes) {
            add_pairs<V, R>(sum, w, v0, x, prefetch, AllPairs());
            x += From::kPairs * Codec::kPairBytes * R;
          }
        }
        if constexpr (From::kScaled) {
          add_piece<S, true>(sum, factor, out, v0);
        } else {
          store_sums<S>(sum, out, v0);
        }
      }
    }
  }

  static KT_INLINE void finish(const uint8_t*, int64_t, float*, int64_t) {}

 private:
  using AllPairs = std::make_integer_sequence<int, From::kPairs>;

  template <int V, int R, int... I>
  static KT_INLINE void add_pairs(typename S::F (&sum)[V][R], const uint8_t* w, int v0,
                                  const uint8_t* x, Prefetch prefetch,
                                  std::integer_sequence<int, I...>) {
    KT_UNROLL
    for (int v = v0; v < v0 + V; ++v) ask_ahead<S>(w + v * S::kLanes * 4, prefetch);
    (add_pair<I, V, R>(sum, w, v0, x + I * Codec::kPairBytes * R), ...);
  }
  template <int I, int V, int R>
  static KT_INLINE void add_pair(typename S::F (&sum)[V][R], const uint8_t* w, int v0,
                                 const uint8_t* x) {
    typename S::I weight[V];
    KT_UNROLL
    for (int v = 0; v < V; ++v) weight[v] = From::template pair<I>(w, (v0 + v) * S::kLanes);
    KT_UNROLL
    for (int r = 0; r < R; ++r) {
      const typename S::I value = S::broadcast4(x + r * Codec::kPairBytes);
      KT_UNROLL
      for (int v = 0; v < V; ++v) sum[v][r] = S::dot_bf16(sum[v][r], weight[v], value);
    }
  }
};

template <class S>
using Bf16 =
    std::conditional_t<S::kBf16Dot, Bf16Pairs<S, PairsFromBf16<S>>, Floats<S, FromBf16<S>>>;
template <class S>
using F8 = std::conditional_t<S::kBf16Dot, Bf16Pairs<S, PairsFromF8<S>>, Floats<S, FromF8<S>>>;

// Calls dot<R> for a run-time R.
template <class S, class Format, int R = Format::kMaxRows>
static KT_INLINE void dot_block(const WeightLayout& layout, int rows, const uint8_t* block,
                                const Range& range, const uint8_t* tile, float* out,
                                const Prefetch& prefetch, const Ahead<S>& ahead) {
  if (rows == R) return Format::template dot<R>(layout, block, range, tile, out, prefetch, ahead);
  if constexpr (R > 1) {
    return dot_block<S, Format, R - 1>(layout, rows, block, range, tile, out, prefetch, ahead);
  }
}

template <class S, class Format, int R = Format::kMaxRows>
static KT_INLINE void dot_panel(int rows, const typename Format::Panel& panel, const Range& range,
                                const uint8_t* tile, float* out, const Ahead<S>& ahead) {
  if (rows == R) return panel.template dot<R>(range, tile, out, ahead);
  if constexpr (R > 1) {
    return dot_panel<S, Format, R - 1>(rows, panel, range, tile, out, ahead);
  }
}

// Groups that several tiles are multiplied with in turn: 32 KiB of bf16.
static constexpr int64_t kDirectGroups = 16;

// At most this many rows go through one product, so that their sums stay in the second-level cache: 64 KiB.
static constexpr int kProductRows = 512;

// Tiles whose activations go through a block together: about 4 MiB of them, which a third-level cache keeps for the
// next block (or less, and a second-level cache, for what multiplies faster than a third one reads), but no
// fewer rows than make a panel pay, and at most a product's.
template <class Format>
static int tiles_of_portion(int64_t token_bytes) {
  int64_t bytes = int64_t{4} << 20;
  if constexpr (requires { Format::kPortionBytes; }) bytes = Format::kPortionBytes;
  const int64_t rows = bytes / token_bytes, least = 128, most = kProductRows;
  return static_cast<int>((rows < least ? least : rows > most ? most : rows) / Format::kMaxRows);
}

// The most rows of a tile that is an expert's only one.
template <class Format>
static constexpr int max_rows_alone() {
  if constexpr (requires { Format::kMaxRowsAlone; }) return Format::kMaxRowsAlone;
  return Format::kMaxRows;
}

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

// One block times up to tiles_of_portion() tiles, whose numbers of tokens differ by one at most:
// out [tile.first - tiles[0].first ...][planes][32]; then, with several planes, their sum [token][32] at the
// beginning of each tile's place.
template <class S, class Format>
KT_NOINLINE static void multiply(const WeightLayout& layout, const uint8_t* block, int64_t groups,
                                 const TokenTile* tiles, int count, int planes,
                                 const EncodedTiles& encoded, float* out,
                                 const Prefetch& prefetch) {
  const auto place = [&](const TokenTile& tile) {
    return out + (tile.first - tiles[0].first) * planes * kBlockRows;
  };
  const TokenTile& last = tiles[count - 1];
  const int64_t rows = (last.first + last.tokens - tiles[0].first) * planes;
  if constexpr (!Format::kOverwrites) {
    std::memset(out, 0, static_cast<size_t>(rows * kBlockRows) * sizeof(float));
  }
  // Calls f(i, range, ahead) for every tile i, and that for one range of columns after the other. What the
  // next range, or the next block, is made of comes from memory meanwhile: a part of it with each tile.
  [[maybe_unused]] const auto each = [&](int64_t step, auto&& begin, auto&& f) {
    const int64_t every = prefetch.panel_step;
    const int64_t lines = every * ceil_div(ceil_div(layout.group_bytes(), 64 * every), count);
    for (int64_t first = 0; first < groups; first += step) {
      const Range range{first, groups - first < step ? groups - first : step, groups};
      const uint8_t* next = block + layout.group_at(first + step);
      begin(range);
      for (int i = 0; i < count; ++i) {
        f(i, range, Ahead<S>{next + i * step * lines * 64, lines, every});
      }
    }
  };
  if constexpr (requires { Format::kTiles; }) {
    Format::template multiply<Format>(layout, block, groups, tiles, count, encoded, prefetch,
                                      place);
  } else {
    const auto directly = [&] {
      const auto dot = [&](int i, const Range& range, const Ahead<S>& ahead) {
        dot_block<S, Format>(layout, tiles[i].tokens * planes, block, range, encoded(tiles[i]),
                             place(tiles[i]), prefetch, ahead);
      };
      // Several tiles find a range in the cache that the first has brought there; one asks for what is soon
      // needed, line by line.
      if (count > 1) return each(kDirectGroups, [](const Range&) {}, dot);
      // Where the sums of a tile of three rows and more do not fit in registers, it goes through the weights
      // more than once: a range at a time, which stays in the first-level cache, or each pass would read memory.
      constexpr bool kFits = kBlockRows / S::kLanes <= 2;
      const int64_t step = kFits || tiles[0].tokens * planes <= 2 ? groups : kDirectGroups;
      for (int64_t first = 0; first < groups; first += step) {
        const int64_t left = groups - first;
        dot(0, {first, left < step ? left : step, groups}, Ahead<S>{block, 0, 1});
      }
    };
    if constexpr (Format::kDirectTiles == std::numeric_limits<int>::max()) {
      directly();
    } else if (count <= Format::kDirectTiles || last.tokens * planes <= Format::kDirectRows) {
      directly();  // small tiles may not be encoded for a panel; more than two tiles have more rows anyhow
    } else {
      typename Format::Panel panel;
      each(
          Format::Panel::kGroups,
          [&](const Range& range) { Format::expand(layout, block, range, panel); },
          [&](int i, const Range& range, const Ahead<S>& ahead) {
            dot_panel<S, Format>(tiles[i].tokens * planes, panel, range, encoded(tiles[i]),
                                 place(tiles[i]), ahead);
          });
    }
  }
  Format::finish(block, groups, out, rows);
  if (planes == 1) return;
  for (int i = 0; i < count; ++i) {
    float* c = place(tiles[i]);
    for (int32_t t = 0; t < tiles[i].tokens; ++t) {
      for (int v = 0; v < kBlockRows; v += S::kLanes) {
        typename S::F sum = S::load(c + t * planes * kBlockRows + v);
        for (int p = 1; p < planes; ++p) {
          sum = S::add(sum, S::load(c + (t * planes + p) * kBlockRows + v));
        }
        S::store(c + t * kBlockRows + v, sum);
      }
    }
  }
}

// The same for tiles that are fine or not, all of them alike.
template <class S, class Format, class... Args>
static KT_INLINE void multiply_alike(bool fine, Args&&... args) {
  if constexpr (!std::is_same_v<typename Format::Fine, Format>) {
    if (fine) return multiply<S, typename Format::Fine>(args...);
  }
  multiply<S, Format>(args...);
}

}  // namespace ktcore::KTCORE_ISA
