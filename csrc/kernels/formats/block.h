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
// A format is a struct with these, in a file of this folder by what its activations are (see encode.h for the
// codecs), and a line in table.inl:
//
//   Codec, Fine       of activations; the format's struct for tokens whose activations Codec would change too much
//   kMaxRows          rows of a tile
//   kMaxRowsAlone     of one that is an expert's only one, where that may be larger
//   kDirectTiles      up to so many tiles, or of so many rows (kDirectRows), dot is as fast as a panel
//   kRowScales        true where every layout has scales of rows (a format without leaves it out)
#pragma once

namespace ktcore::KTCORE_ISA {

// Whether floating-point weights become integers of 16 bits, where results need not be exact: without dot products
// of their own they are multiplied twice as fast as these.
template <class S>
static constexpr bool kFloatsAsInt16 = !S::kBf16Dot && S::kByteDots;

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

// Groups [first, first + count) of the `groups` of a block.
struct Range {
  int64_t first, count, groups;
};

// Groups that several tiles are multiplied with in turn: 32 KiB of bf16.
static constexpr int64_t kDirectGroups = 16;

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

}  // namespace ktcore::KTCORE_ISA
