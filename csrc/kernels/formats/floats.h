// Floating-point weights times float32 activations (FloatCodec).
#pragma once

namespace ktcore::KTCORE_ISA {

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

}  // namespace ktcore::KTCORE_ISA
