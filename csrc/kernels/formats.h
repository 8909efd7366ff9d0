// The dot products of one block (32 weight rows) with tiles of R activation rows, for each weight
// format, in two ways that give the same bits:
//
//   dot      reads the packed block once and widens it in registers: for few tokens, bound by memory
//   expand   widens a piece of the block into a panel in the first-level cache, which panel_dot then
//            multiplies with tile after tile: for many tokens, bound by the dot-product units
//
// Every output is summed in the order of the columns in one lane, whatever R is and whichever way is
// taken, so a token's result does not depend on which tokens share its batch.
//
// The loops are functions of their own: inlined into their callers, compilers run out of registers.
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

// The sum of row r's activations over a piece of kPieces a group.
template <int kPieces, int R>
static KT_INLINE float piece_sum(const float* sums, int64_t piece, int r) {
  if constexpr (kPieces == 2) return sums[piece * R + r];
  return sums[2 * piece * R + r] + sums[(2 * piece + 1) * R + r];
}

// One group of 32 columns is 16 pairs; a panel holds kPanelGroups groups: [pair][32 rows] of 16-bit
// pairs, 16 KiB, which leaves the rest of a first-level cache to a tile of activations.
static constexpr int64_t kPanelGroups = 8;

// Panels of 16-bit weights, for all integer formats, with kSets sets of scales a group: none, one, or
// two for 16 columns each.
template <class S, int kSets>
struct Int16Panel {
  static constexpr int64_t kGroups = kPanelGroups;
  static constexpr int kPieces = kSets > 1 ? kSets : 1;  // of a group, summed each on its own
  static constexpr int64_t kScales = kSets > 0 ? kGroups * kSets * kBlockRows : 16;
  alignas(64) uint8_t weights[kGroups * (kGroup / 2) * kUnitBytes];
  alignas(64) float scales[kScales];   // [group][set][32 rows]
  alignas(64) float offsets[kScales];  // the same, where has_offsets
  bool has_offsets = false;

  // Adds groups [first, first + count) of a tile to `out` [R][32].
  template <int R>
  KT_NOINLINE void dot(int64_t first, int64_t count, int64_t groups, const uint8_t* tile,
                       float* out) const {
    constexpr int V = vectors_at_once<S>(R, S::kIntCells);
    const float* x_scale = Int16Codec<S>::scales(tile, R, groups) + first * R;
    const float* x_sum = Int16Codec<S>::sums(tile, R, groups) + 2 * first * R;
    for (int v0 = 0; v0 < static_cast<int>(kBlockRows) / S::kLanes; v0 += V) {
      const uint8_t* w = weights + v0 * S::kLanes * 4;
      const uint8_t* a = tile + first * kGroup * 2 * R;
      for (int64_t piece = 0; piece < count * kPieces; ++piece) {
        typename S::I acc[V][R];
        KT_UNROLL
        for (int v = 0; v < V; ++v) {
          KT_UNROLL
          for (int r = 0; r < R; ++r) acc[v][r] = S::zero_i();
        }
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
              for (int v = 0; v < V; ++v) acc[v][r] = S::dot_i16(acc[v][r], weight[v], x);
            }
          }
        }
        KT_UNROLL
        for (int r = 0; r < R; ++r) {
          const typename S::F xs = S::set1(x_scale[piece / kPieces * R + r]);
          KT_UNROLL
          for (int v = 0; v < V; ++v) {
            typename S::F scale = xs;
            if constexpr (kSets > 0) {
              scale = S::mul(S::load(scales + piece * kBlockRows + (v0 + v) * S::kLanes), xs);
            }
            float* to = out + r * kBlockRows + (v0 + v) * S::kLanes;
            S::store(to, S::fma(S::to_f32(acc[v][r]), scale, S::load(to)));
          }
        }
        if constexpr (kSets > 0) {
          if (has_offsets) add_offsets<R>(piece, x_sum, v0, out);
        }
      }
    }
  }

 private:
  template <int R>
  KT_INLINE void add_offsets(int64_t piece, const float* x_sum, int v0, float* out) const {
    constexpr int V = vectors_at_once<S>(R, S::kIntCells);
    for (int r = 0; r < R; ++r) {
      const typename S::F x = S::set1(piece_sum<kSets, R>(x_sum, piece, r));
      for (int v = v0; v < v0 + V; ++v) {
        float* to = out + r * kBlockRows + v * S::kLanes;
        const typename S::F offset = S::load(offsets + piece * kBlockRows + v * S::kLanes);
        S::store(to, S::fma(offset, x, S::load(to)));
      }
    }
  }
};

template <class S>
struct Int4Group32 {
  using Codec = Int16Codec<S>;
  using Panel = Int16Panel<S, 1>;
  static constexpr int kMaxRows = S::kIntRows;
  static constexpr int kPlanes = 1, kExactPlanes = 1;
  static constexpr bool kPanels = true;
  static constexpr int kUnits = static_cast<int>(kGroup) / 8;
  static constexpr int64_t kGroupBytes = kUnits * kUnitBytes + kBlockRows * 2;

  template <int R>
  KT_NOINLINE static void dot(const WeightLayout&, const uint8_t* block, int64_t groups,
                              const uint8_t* tile, float* out, int64_t prefetch) {
    constexpr int V = vectors_at_once<S>(R, S::kIntCells);
    const float* x_scale = Codec::scales(tile, R, groups);
    const int32_t* offset = Codec::offsets(tile, R, groups);
    for (int v0 = 0; v0 < static_cast<int>(kBlockRows) / S::kLanes; v0 += V) {
      typename S::F acc[V][R];
      KT_UNROLL
      for (int v = 0; v < V; ++v) {
        KT_UNROLL
        for (int r = 0; r < R; ++r) acc[v][r] = S::zero();
      }
      const uint8_t* a = tile;
      const uint8_t* w = block + v0 * S::kLanes * 4;
      for (int64_t g = 0; g < groups; ++g, a += 2 * kGroup * R, w += kGroupBytes) {
        typename S::I sum[V][R];
        KT_UNROLL
        for (int r = 0; r < R; ++r) {
          KT_UNROLL
          for (int v = 0; v < V; ++v) sum[v][r] = S::set1_i32(offset[g * R + r]);
        }
        KT_UNROLL
        for (int unit = 0; unit < kUnits; ++unit) {
          typename S::I raw[V];
          KT_UNROLL
          for (int v = 0; v < V; ++v) {
            const uint8_t* p = w + unit * kUnitBytes + v * S::kLanes * 4;
            if constexpr (R <= 2) S::prefetch(p + prefetch);
            raw[v] = S::load_i(p);
          }
          // Nibble 0 of the 16 bits holds columns 0 and 2, 2: 1 and 3, 1: 4 and 6, 3: 5 and 7.
          dot_nibble<0, V, R>(sum, raw, a + (unit * 4 + 0) * R * 4);
          dot_nibble<2, V, R>(sum, raw, a + (unit * 4 + 1) * R * 4);
          dot_nibble<1, V, R>(sum, raw, a + (unit * 4 + 2) * R * 4);
          dot_nibble<3, V, R>(sum, raw, a + (unit * 4 + 3) * R * 4);
        }
        const auto* scales =
            reinterpret_cast<const uint16_t*>(block + g * kGroupBytes + kUnits * kUnitBytes);
        KT_UNROLL
        for (int v = 0; v < V; ++v) {
          const typename S::F scale = S::load_bf16(scales + (v0 + v) * S::kLanes);
          KT_UNROLL
          for (int r = 0; r < R; ++r) {
            const typename S::F both = S::mul(scale, S::set1(x_scale[g * R + r]));
            acc[v][r] = S::fma(S::to_f32(sum[v][r]), both, acc[v][r]);
          }
        }
      }
      KT_UNROLL
      for (int v = 0; v < V; ++v) {
        KT_UNROLL
        for (int r = 0; r < R; ++r)
          S::store(out + r * kBlockRows + (v0 + v) * S::kLanes, acc[v][r]);
      }
    }
  }

  static void expand(const WeightLayout&, const uint8_t* block, int64_t first, int64_t count,
                     Panel& panel) {
    const typename S::I eight = S::set1_i16(8);
    uint8_t* to = panel.weights;
    for (int64_t g = 0; g < count; ++g) {
      const uint8_t* w = block + (first + g) * kGroupBytes;
      for (int unit = 0; unit < kUnits; ++unit, w += kUnitBytes, to += 4 * kUnitBytes) {
        for (int64_t at = 0; at < kUnitBytes; at += S::kLanes * 4) {
          const typename S::I raw = S::load_i(w + at);
          S::store_i(to + at, S::sub_i16(S::template nibble<0>(raw), eight));
          S::store_i(to + kUnitBytes + at, S::sub_i16(S::template nibble<2>(raw), eight));
          S::store_i(to + 2 * kUnitBytes + at, S::sub_i16(S::template nibble<1>(raw), eight));
          S::store_i(to + 3 * kUnitBytes + at, S::sub_i16(S::template nibble<3>(raw), eight));
        }
      }
      for (int64_t r = 0; r < kBlockRows; r += S::kLanes) {
        S::store(panel.scales + g * kBlockRows + r,
                 S::load_bf16(reinterpret_cast<const uint16_t*>(w) + r));
      }
    }
  }

  static KT_INLINE void finish(const uint8_t*, int64_t, float*, int64_t) {}

 private:
  template <int N, int V, int R>
  static KT_INLINE void dot_nibble(typename S::I (&sum)[V][R], const typename S::I (&raw)[V],
                                   const uint8_t* a) {
    typename S::I weight[V];
    KT_UNROLL
    for (int v = 0; v < V; ++v) weight[v] = S::template nibble<N>(raw[v]);
    KT_UNROLL
    for (int r = 0; r < R; ++r) {
      const typename S::I x = S::broadcast4(a + r * 4);
      KT_UNROLL
      for (int v = 0; v < V; ++v) sum[v][r] = S::dot_i16(sum[v][r], weight[v], x);
    }
  }
};

template <class S>
struct Int8Channel {
  using Codec = Int16Codec<S>;
  using Panel = Int16Panel<S, 0>;
  static constexpr int kMaxRows = S::kIntRows;
  static constexpr int kPlanes = 1, kExactPlanes = 1;
  static constexpr bool kPanels = true;
  static constexpr int kUnits = static_cast<int>(kGroup) / 4;
  static constexpr int64_t kGroupBytes = kUnits * kUnitBytes;

  template <int R>
  KT_NOINLINE static void dot(const WeightLayout&, const uint8_t* block, int64_t groups,
                              const uint8_t* tile, float* out, int64_t prefetch) {
    constexpr int V = vectors_at_once<S>(R, S::kIntCells);
    const float* x_scale = Codec::scales(tile, R, groups);
    for (int v0 = 0; v0 < static_cast<int>(kBlockRows) / S::kLanes; v0 += V) {
      typename S::F acc[V][R];
      KT_UNROLL
      for (int v = 0; v < V; ++v) {
        KT_UNROLL
        for (int r = 0; r < R; ++r) acc[v][r] = S::zero();
      }
      const uint8_t* a = tile;
      const uint8_t* w = block + v0 * S::kLanes * 4;
      for (int64_t g = 0; g < groups; ++g, a += 2 * kGroup * R, w += kGroupBytes) {
        typename S::I sum[V][R];
        KT_UNROLL
        for (int v = 0; v < V; ++v) {
          KT_UNROLL
          for (int r = 0; r < R; ++r) sum[v][r] = S::zero_i();
        }
        KT_UNROLL
        for (int unit = 0; unit < kUnits; ++unit) {
          typename S::I raw[V], weight[V];
          KT_UNROLL
          for (int v = 0; v < V; ++v) {
            const uint8_t* p = w + unit * kUnitBytes + v * S::kLanes * 4;
            if constexpr (R <= 2) S::prefetch(p + prefetch);
            raw[v] = S::load_i(p);
            weight[v] = S::even_bytes(raw[v]);
          }
          dot_pair<V, R>(sum, weight, a + (unit * 2) * R * 4);
          KT_UNROLL
          for (int v = 0; v < V; ++v) weight[v] = S::odd_bytes(raw[v]);
          dot_pair<V, R>(sum, weight, a + (unit * 2 + 1) * R * 4);
        }
        KT_UNROLL
        for (int r = 0; r < R; ++r) {
          const typename S::F scale = S::set1(x_scale[g * R + r]);
          KT_UNROLL
          for (int v = 0; v < V; ++v) {
            acc[v][r] = S::fma(S::to_f32(sum[v][r]), scale, acc[v][r]);
          }
        }
      }
      KT_UNROLL
      for (int v = 0; v < V; ++v) {
        KT_UNROLL
        for (int r = 0; r < R; ++r)
          S::store(out + r * kBlockRows + (v0 + v) * S::kLanes, acc[v][r]);
      }
    }
    finish(block, groups, out, R);
  }

  static void expand(const WeightLayout&, const uint8_t* block, int64_t first, int64_t count,
                     Panel& panel) {
    const uint8_t* w = block + first * kGroupBytes;
    uint8_t* to = panel.weights;
    for (int64_t unit = 0; unit < count * kUnits; ++unit, w += kUnitBytes, to += 2 * kUnitBytes) {
      for (int64_t at = 0; at < kUnitBytes; at += S::kLanes * 4) {
        const typename S::I raw = S::load_i(w + at);
        S::store_i(to + at, S::even_bytes(raw));
        S::store_i(to + kUnitBytes + at, S::odd_bytes(raw));
      }
    }
  }

  // Applies the channels' scales.
  static KT_INLINE void finish(const uint8_t* block, int64_t groups, float* out, int64_t rows) {
    const auto* channel = reinterpret_cast<const float*>(block + groups * kGroupBytes);
    for (int v = 0; v < kBlockRows; v += S::kLanes) {
      const typename S::F scale = S::load(channel + v);
      for (int64_t r = 0; r < rows; ++r) {
        float* to = out + r * kBlockRows + v;
        S::store(to, S::mul(S::load(to), scale));
      }
    }
  }

 private:
  template <int V, int R>
  static KT_INLINE void dot_pair(typename S::I (&sum)[V][R], const typename S::I (&weight)[V],
                                 const uint8_t* a) {
    KT_UNROLL
    for (int r = 0; r < R; ++r) {
      const typename S::I x = S::broadcast4(a + r * 4);
      KT_UNROLL
      for (int v = 0; v < V; ++v) sum[v][r] = S::dot_i16(sum[v][r], weight[v], x);
    }
  }
};

// Weights as levels with scales and maybe offsets: nibbles that number 16 levels, or the levels
// themselves as bytes; kSets sets of scales a group. What varies more finely is in the layout.
template <class S, bool kNibbles, int kSets>
struct Coded {
  using Codec = Int16Codec<S>;
  using Panel = Int16Panel<S, kSets>;
  static constexpr int kMaxRows = S::kIntRows;
  static constexpr int kPlanes = 1, kExactPlanes = 1;
  static constexpr bool kPanels = true;
  static constexpr int kUnits = static_cast<int>(kGroup) / (kNibbles ? 8 : 4);

  template <int R>
  KT_NOINLINE static void dot(const WeightLayout& layout, const uint8_t* block, int64_t groups,
                              const uint8_t* tile, float* out, int64_t prefetch) {
    constexpr int V = vectors_at_once<S>(R, S::kIntCells);
    const int64_t group_bytes = layout.group_bytes();
    const float* x_scale = Codec::scales(tile, R, groups);
    const float* x_sum = Codec::sums(tile, R, groups);
    const typename S::I levels = S::table16(layout.levels);
    for (int v0 = 0; v0 < static_cast<int>(kBlockRows) / S::kLanes; v0 += V) {
      typename S::F acc[V][R];
      KT_UNROLL
      for (int v = 0; v < V; ++v) {
        KT_UNROLL
        for (int r = 0; r < R; ++r) acc[v][r] = S::zero();
      }
      const uint8_t* a = tile;
      const uint8_t* group = block;
      for (int64_t g = 0; g < groups; ++g, group += group_bytes) {
        for (int set = 0; set < kSets; ++set) {
          const uint8_t* w = group + set * (kUnits / kSets) * kUnitBytes + v0 * S::kLanes * 4;
          typename S::I sum[V][R];
          KT_UNROLL
          for (int v = 0; v < V; ++v) {
            KT_UNROLL
            for (int r = 0; r < R; ++r) sum[v][r] = S::zero_i();
          }
          KT_UNROLL
          for (int unit = 0; unit < kUnits / kSets; ++unit, w += kUnitBytes) {
            typename S::I raw[V];
            KT_UNROLL
            for (int v = 0; v < V; ++v) {
              const uint8_t* p = w + v * S::kLanes * 4;
              if constexpr (R <= 2) S::prefetch(p + prefetch);
              raw[v] = S::load_i(p);
            }
            if constexpr (kNibbles) {
              typename S::I bytes[V];
              KT_UNROLL
              for (int v = 0; v < V; ++v) bytes[v] = S::look_up(levels, S::low_nibbles(raw[v]));
              dot_bytes<V, R>(sum, bytes, a);
              a += 8 * R;
              KT_UNROLL
              for (int v = 0; v < V; ++v) bytes[v] = S::look_up(levels, S::high_nibbles(raw[v]));
              dot_bytes<V, R>(sum, bytes, a);
            } else {
              dot_bytes<V, R>(sum, raw, a);
            }
            a += 8 * R;
          }
          const int64_t piece = g * kSets + set;
          KT_UNROLL
          for (int v = 0; v < V; ++v) {
            const typename S::F scale = load_scales(layout, group, set, v0 + v);
            KT_UNROLL
            for (int r = 0; r < R; ++r) {
              const typename S::F both = S::mul(scale, S::set1(x_scale[g * R + r]));
              acc[v][r] = S::fma(S::to_f32(sum[v][r]), both, acc[v][r]);
            }
          }
          if (layout.offsets) {
            KT_UNROLL
            for (int v = 0; v < V; ++v) {
              const typename S::F offset = load_scales(layout, group, kSets + set, v0 + v);
              KT_UNROLL
              for (int r = 0; r < R; ++r) {
                const typename S::F x = S::set1(piece_sum<kSets, R>(x_sum, piece, r));
                acc[v][r] = S::fma(offset, x, acc[v][r]);
              }
            }
          }
        }
      }
      KT_UNROLL
      for (int v = 0; v < V; ++v) {
        KT_UNROLL
        for (int r = 0; r < R; ++r) {
          S::store(out + r * kBlockRows + (v0 + v) * S::kLanes, acc[v][r]);
        }
      }
    }
  }

  static void expand(const WeightLayout& layout, const uint8_t* block, int64_t first, int64_t count,
                     Panel& panel) {
    const int64_t group_bytes = layout.group_bytes();
    const typename S::I levels = S::table16(layout.levels);
    uint8_t* to = panel.weights;
    panel.has_offsets = layout.offsets;
    for (int64_t g = 0; g < count; ++g) {
      const uint8_t* group = block + (first + g) * group_bytes;
      const uint8_t* w = group;
      for (int unit = 0; unit < kUnits; ++unit, w += kUnitBytes) {
        for (int64_t at = 0; at < kUnitBytes; at += S::kLanes * 4) {
          const typename S::I raw = S::load_i(w + at);
          if constexpr (kNibbles) {
            store_bytes(S::look_up(levels, S::low_nibbles(raw)), to + at);
            store_bytes(S::look_up(levels, S::high_nibbles(raw)), to + 2 * kUnitBytes + at);
          } else {
            store_bytes(raw, to + at);
          }
        }
        to += (kNibbles ? 4 : 2) * kUnitBytes;
      }
      for (int set = 0; set < kSets; ++set) {
        for (int v = 0; v < static_cast<int>(kBlockRows) / S::kLanes; ++v) {
          const int64_t at = (g * kSets + set) * kBlockRows + v * S::kLanes;
          S::store(panel.scales + at, load_scales(layout, group, set, v));
          if (layout.offsets) {
            S::store(panel.offsets + at, load_scales(layout, group, kSets + set, v));
          }
        }
      }
    }
  }

  static KT_INLINE void finish(const uint8_t*, int64_t, float*, int64_t) {}

 private:
  // Vector v of a group's set of scales; offsets come after all scales.
  static KT_INLINE typename S::F load_scales(const WeightLayout& layout, const uint8_t* group,
                                             int set, int v) {
    const uint8_t* p = group + kUnits * kUnitBytes + set * layout.set_bytes();
    const int64_t at = v * S::kLanes;
    if (layout.scale_type == DType::f32) return S::load(reinterpret_cast<const float*>(p) + at);
    const auto* half = reinterpret_cast<const uint16_t*>(p) + at;
    return layout.scale_type == DType::f16 ? S::load_f16(half) : S::load_bf16(half);
  }

  static KT_INLINE void store_bytes(typename S::I bytes, uint8_t* to) {
    S::store_i(to, S::even_bytes(bytes));
    S::store_i(to + kUnitBytes, S::odd_bytes(bytes));
  }

  // Four columns of signed bytes.
  template <int V, int R>
  static KT_INLINE void dot_bytes(typename S::I (&sum)[V][R], const typename S::I (&bytes)[V],
                                  const uint8_t* a) {
    typename S::I even[V], odd[V];
    KT_UNROLL
    for (int v = 0; v < V; ++v) {
      even[v] = S::even_bytes(bytes[v]);
      odd[v] = S::odd_bytes(bytes[v]);
    }
    KT_UNROLL
    for (int r = 0; r < R; ++r) {
      const typename S::I first = S::broadcast4(a + r * 4);
      const typename S::I second = S::broadcast4(a + (R + r) * 4);
      KT_UNROLL
      for (int v = 0; v < V; ++v) {
        sum[v][r] = S::dot_i16(S::dot_i16(sum[v][r], even[v], first), odd[v], second);
      }
    }
  }
};

// Panels of floats: [column][32 rows].
template <class S>
struct FloatPanel {
  static constexpr int64_t kGroups = kPanelGroups / 2;
  alignas(64) float weights[kGroups * kGroup * kBlockRows];

  template <int R>
  KT_NOINLINE void dot(int64_t first, int64_t count, int64_t, const uint8_t* tile,
                       float* out) const {
    constexpr int V = vectors_at_once<S>(R, S::kFloatCells);
    for (int v0 = 0; v0 < static_cast<int>(kBlockRows) / S::kLanes; v0 += V) {
      typename S::F acc[V][R];
      KT_UNROLL
      for (int v = 0; v < V; ++v) {
        KT_UNROLL
        for (int r = 0; r < R; ++r) {
          acc[v][r] = S::load(out + r * kBlockRows + (v0 + v) * S::kLanes);
        }
      }
      const float* w = weights + v0 * S::kLanes;
      const auto* x = reinterpret_cast<const float*>(tile) + first * kGroup * R;
      for (int64_t pair = 0; pair < count * (kGroup / 2); ++pair, x += 2 * R) {
        KT_UNROLL
        for (int i = 0; i < 2; ++i, w += kBlockRows) {
          typename S::F weight[V];
          KT_UNROLL
          for (int v = 0; v < V; ++v) {
            weight[v] = S::load(w + v * S::kLanes);
            if constexpr (R > 1) KT_IN_REGISTER(weight[v]);
          }
          KT_UNROLL
          for (int r = 0; r < R; ++r) {
            const typename S::F value = S::set1(x[2 * r + i]);
            KT_UNROLL
            for (int v = 0; v < V; ++v) acc[v][r] = S::fma(weight[v], value, acc[v][r]);
          }
        }
      }
      KT_UNROLL
      for (int v = 0; v < V; ++v) {
        KT_UNROLL
        for (int r = 0; r < R; ++r)
          S::store(out + r * kBlockRows + (v0 + v) * S::kLanes, acc[v][r]);
      }
    }
  }
};

template <class S>
struct Bf16 {
  using Codec = Bf16Codec<S>;
  using Panel = FloatPanel<S>;
  static constexpr int kMaxRows = S::kFloatRows;
  static constexpr int kPlanes = 1, kExactPlanes = S::kBf16Dot ? 2 : 1;
  // A dot-product instruction takes the packed block as it is.
  static constexpr bool kPanels = !S::kBf16Dot;

  template <int R>
  KT_NOINLINE static void dot(const WeightLayout&, const uint8_t* block, int64_t groups,
                              const uint8_t* tile, float* out, int64_t prefetch) {
    constexpr int V = vectors_at_once<S>(R, S::kFloatCells);
    for (int v0 = 0; v0 < static_cast<int>(kBlockRows) / S::kLanes; v0 += V) {
      const uint8_t* w = block + v0 * S::kLanes * 4;
      typename S::F acc[V][R];
      KT_UNROLL
      for (int v = 0; v < V; ++v) {
        KT_UNROLL
        for (int r = 0; r < R; ++r) acc[v][r] = S::zero();
      }
      const uint8_t* a = tile;
      for (int64_t pair = 0; pair < groups * (kGroup / 2); ++pair) {
        typename S::Wb weight[V];
        KT_UNROLL
        for (int v = 0; v < V; ++v) {
          const uint8_t* p = w + v * S::kLanes * 4;
          if constexpr (R <= 2) S::prefetch(p + prefetch);
          weight[v] = S::weight_bf16(S::load_i(p));
        }
        KT_UNROLL
        for (int r = 0; r < R; ++r) {
          const typename S::Ab x = S::activation_bf16(a + r * Codec::kPairBytes);
          KT_UNROLL
          for (int v = 0; v < V; ++v) acc[v][r] = S::dot_bf16(acc[v][r], weight[v], x);
        }
        a += R * Codec::kPairBytes;
        w += kUnitBytes;
      }
      KT_UNROLL
      for (int v = 0; v < V; ++v) {
        KT_UNROLL
        for (int r = 0; r < R; ++r)
          S::store(out + r * kBlockRows + (v0 + v) * S::kLanes, acc[v][r]);
      }
    }
  }

  static void expand(const WeightLayout&, const uint8_t* block, int64_t first, int64_t count,
                     Panel& panel) {
    const uint8_t* w = block + first * (kGroup / 2) * kUnitBytes;
    float* to = panel.weights;
    for (int64_t pair = 0; pair < count * (kGroup / 2); ++pair, to += 2 * kBlockRows) {
      for (int v = 0; v < kBlockRows; v += S::kLanes, w += S::kLanes * 4) {
        const typename S::I raw = S::load_i(w);
        S::store(to + v, S::low_bf16(raw));
        S::store(to + kBlockRows + v, S::high_bf16(raw));
      }
    }
  }

  static KT_INLINE void finish(const uint8_t*, int64_t, float*, int64_t) {}
};

// Calls dot<R> for a run-time R.
template <class Format, int R = Format::kMaxRows>
static KT_INLINE void dot_block(const WeightLayout& layout, int rows, const uint8_t* block,
                                int64_t groups, const uint8_t* tile, float* out, int64_t prefetch) {
  if (rows == R) return Format::template dot<R>(layout, block, groups, tile, out, prefetch);
  if constexpr (R > 1) {
    return dot_block<Format, R - 1>(layout, rows, block, groups, tile, out, prefetch);
  }
}

template <class Format, int R = Format::kMaxRows>
static KT_INLINE void dot_panel(int rows, const typename Format::Panel& panel, int64_t first,
                                int64_t count, int64_t groups, const uint8_t* tile, float* out) {
  if (rows == R) return panel.template dot<R>(first, count, groups, tile, out);
  if constexpr (R > 1) {
    return dot_panel<Format, R - 1>(rows, panel, first, count, groups, tile, out);
  }
}

// At most this many rows go through one product, so that their sums stay in the cache.
static constexpr int kProductRows = 128;

template <class Format>
static constexpr int tiles_at_once() {
  return kProductRows / Format::kMaxRows;
}

// One block times up to tiles_at_once() tiles: out [tile.first - tiles[0].first ...][planes][32];
// then, with several planes, their sum [token][32] at the beginning of each tile's place.
// `encoded(tile)` is where a tile's activations are.
template <class S, class Format, class Encoded>
static void multiply(const WeightLayout& layout, const uint8_t* block, int64_t groups,
                     const TokenTile* tiles, int count, int planes, Encoded encoded, float* out,
                     int64_t prefetch) {
  const auto place = [&](const TokenTile& tile) {
    return out + (tile.first - tiles[0].first) * planes * kBlockRows;
  };
  if (count == 1 || !Format::kPanels) {
    for (int i = 0; i < count; ++i) {
      dot_block<Format>(layout, tiles[i].tokens * planes, block, groups, encoded(tiles[i]),
                        place(tiles[i]), prefetch);
    }
  } else {
    const TokenTile& last = tiles[count - 1];
    const int64_t rows = (last.first + last.tokens - tiles[0].first) * planes;
    std::memset(out, 0, static_cast<size_t>(rows * kBlockRows) * sizeof(float));
    typename Format::Panel panel;
    constexpr int64_t kStep = Format::Panel::kGroups;
    for (int64_t first = 0; first < groups; first += kStep) {
      const int64_t piece = groups - first < kStep ? groups - first : kStep;
      Format::expand(layout, block, first, piece, panel);
      // What the next panel, or the next block, is made of comes from memory meanwhile.
      const uint8_t* next = block + (first + kStep) * layout.group_bytes();
      const int64_t lines = ceil_div(kStep * layout.group_bytes() / 64, count);
      for (int i = 0; i < count; ++i) {
        for (int64_t line = 0; line < lines; ++line, next += 64) S::prefetch_l2(next);
        dot_panel<Format>(tiles[i].tokens * planes, panel, first, piece, groups, encoded(tiles[i]),
                          place(tiles[i]));
      }
    }
    Format::finish(block, groups, out, rows);
  }
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

}  // namespace ktcore::KTCORE_ISA
