// Weights times activations in tiles of bf16 (AMX), of sixteen rows by sixteen columns of 32 products each:
// formats that widen their weights, scaled, to bf16 in a panel, which is then multiplied with tile after tile of
// activations. Sums stay in tiles from one end of a panel to the other.
//
// Few tokens are the other kernels' work: widening takes longer than reading.
#pragma once

namespace ktcore::KTCORE_ISA {

// Activations as bf16 (0.2 % of a Gaussian row), a group of a row after the other: bf16[K/32][R][32].
template <class S>
struct TileCodec {
  using F = typename S::F;
  static constexpr int64_t kGroupBytes = kGroup * 2;  // of a row

  static constexpr int64_t row_bytes(int64_t cols) { return ceil_div(cols, kGroup) * kGroupBytes; }

  static KT_INLINE void encode(const F* v, int64_t, Rounding, uint8_t* tile, int64_t rows,
                               int64_t row, int64_t group, int64_t) {
    auto* to = reinterpret_cast<uint16_t*>(tile + (group * rows + row) * kGroupBytes);
    for (int i = 0; i < Rows32<S>::kVectors; ++i) S::store_bf16(to + i * S::kLanes, v[i]);
  }

  static KT_INLINE void gather(const uint8_t* token, int, uint8_t* tile, int64_t rows, int64_t row,
                               int64_t groups) {
    copy_rows<kGroupBytes>(token, 1, tile, rows, row, groups);
  }
};

// Tile registers for the sums of up to 48 rows in one, two or three tiles of equally many. The last may share rows
// with those before, which come out of both alike: so tiles of rows that differ by one need no other registers,
// if none has fewer than a register.
struct RowRegisters {
  const int tiles, rows;  // of each
  const TileScope scope;
  RowRegisters(int most, int least)
      : tiles(tiles_for(most, least)), rows((most + tiles - 1) / tiles), scope(tiles, rows) {}

 private:
  static int tiles_for(int most, int least) {
    const int tiles = (most + 15) / 16;
    return (most + tiles - 1) / tiles > least ? tiles + 1 : tiles;
  }
};

// A group of weights as bf16: [pair][32 rows] of two columns.
static constexpr int64_t kTileGroupBytes = kGroup / 2 * kUnitBytes;

// Some groups of a block as bf16, the last ones that were widened. Where sums of a piece of columns are to be scaled,
// that is because bf16 has no room for the product.
template <class S, int64_t kGroups>
struct TilePanel {
  bool scaled = false;
  int64_t piece_groups = 0;  // a divisor of 4
  alignas(64) uint8_t widened[kGroups * kTileGroupBytes];
  alignas(64) float scales[kGroups * kBlockRows];  // of pieces

  const uint8_t* packed = nullptr;  // the block's groups, where these are bf16 as they are
  KT_INLINE uint8_t* place(int64_t g) { return widened + g % kGroups * kTileGroupBytes; }
  KT_INLINE const uint8_t* group(int64_t g) const {
    return packed != nullptr ? packed + g * kTileGroupBytes
                             : widened + g % kGroups * kTileGroupBytes;
  }
  // The scales of the piece that ends with a group.
  KT_INLINE float* scale(int64_t g) { return scales + g % kGroups * kBlockRows; }
};

// The products of one tile of rows with the groups of a block, one after the other. If it is one of several tiles,
// its activations and sums are read past the first-level cache: that keeps the panel, which all of them need.
template <class S, bool kOneOfSeveral>
class TileSums {
 public:
  static constexpr int64_t kRow = TileCodec<S>::kGroupBytes;

  KT_INLINE TileSums(const RowRegisters& registers, int rows, const uint8_t* tile, float* out)
      : TileSums(registers.tiles, registers.rows, rows, tile, out, kBlockRows) {}
  // So many tiles of `each` rows, where `tile` has `rows`; `stride` numbers from one row of `out` to the next.
  KT_INLINE TileSums(int tiles, int each, int64_t rows, const uint8_t* tile, float* out,
                     int64_t stride)
      : tiles_(tiles), each_(each), rows_(rows), x_(tile), out_(out), stride_(stride) {}

  // Goes on from what `out` holds, or from nothing.
  KT_INLINE void begin(bool continues) const {
    const auto one = [&](auto i, auto j) {
      constexpr int kSum = 2 * i() + j();
      if (continues) {
        load<kSum>(out_ + first_row(i()) * stride_ + 16 * j(), stride_ * 4);
      } else {
        Tiles::zero<kSum>();
      }
    };
    each(one);
  }
  // Adds `count` groups from number `g` of the block on.
  KT_INLINE void add(int64_t g, int64_t count, const uint8_t* w, Ahead<S>& ahead) const {
    const uint8_t* x = x_ + g * rows_ * kRow;
    if (tiles_ == 1) return add_tiles<1>(x, count, w, ahead);
    if (tiles_ == 2) return add_tiles<2>(x, count, w, ahead);
    add_tiles<3>(x, count, w, ahead);
  }
  KT_INLINE void end() const { store(out_, stride_); }
  // The same, times scales: added to what `out` holds, if this continues that. Of a block's rows alone.
  KT_INLINE void end_scaled(const float* scales, bool continues) const {
    alignas(64) float piece[48 * kBlockRows];
    store(piece, kBlockRows);
    for (int v = 0; v < kBlockRows; v += S::kLanes) {
      const typename S::F factor = S::load(scales + v);
      for (int64_t at = v; at < rows_ * kBlockRows; at += kBlockRows) {
        const typename S::F before = continues ? S::load(out_ + at) : S::zero();
        S::store(out_ + at, S::fma(S::load(piece + at), factor, before));
      }
    }
  }

 private:
  template <int N>
  using Number = std::integral_constant<int, N>;
  // Calls f for every tile of sums: of rows i and columns j.
  template <class F>
  KT_INLINE void each(F&& f) const {
    f(Number<0>(), Number<0>());
    f(Number<0>(), Number<1>());
    if (tiles_ == 1) return;
    f(Number<1>(), Number<0>());
    f(Number<1>(), Number<1>());
    if (tiles_ == 2) return;
    f(Number<2>(), Number<0>());
    f(Number<2>(), Number<1>());
  }
  template <int T>
  static KT_INLINE void load(const void* p, int64_t stride) {
    if constexpr (kOneOfSeveral) {
      Tiles::stream<T>(p, stride);
    } else {
      Tiles::load<T>(p, stride);
    }
  }
  KT_INLINE int64_t first_row(int tile) const {
    const int64_t at = tile * each_;
    return at + each_ > rows_ ? rows_ - each_ : at;
  }
  KT_INLINE void store(float* out, int64_t stride) const {
    each([&](auto i, auto j) {
      Tiles::store<2 * i() + j()>(out + first_row(i()) * stride + 16 * j(), stride * 4);
    });
  }
  template <int kTiles>
  KT_INLINE void add_tiles(const uint8_t* x, int64_t count, const uint8_t* w,
                           Ahead<S>& ahead) const {
    const int64_t second = first_row(1) * kRow, third = first_row(2) * kRow;
    for (; count > 0; --count, x += rows_ * kRow, w += kTileGroupBytes) {
      ahead.step();
      if constexpr (kTiles <= 2) {
        Tiles::load<6>(w, kUnitBytes);
        load<4>(x, kRow);
        Tiles::add_bf16<0, 4, 6>();
        Tiles::load<7>(w + 64, kUnitBytes);
        Tiles::add_bf16<1, 4, 7>();
        if constexpr (kTiles == 2) {
          load<5>(x + second, kRow);
          Tiles::add_bf16<2, 5, 6>();
          Tiles::add_bf16<3, 5, 7>();
        }
      } else {
        // Of eight registers, six are sums.
        Tiles::load<7>(w, kUnitBytes);
        Tiles::load<6>(x, kRow);
        Tiles::add_bf16<0, 6, 7>();
        Tiles::load<6>(x + second, kRow);
        Tiles::add_bf16<2, 6, 7>();
        Tiles::load<6>(x + third, kRow);
        Tiles::add_bf16<4, 6, 7>();
        Tiles::load<7>(w + 64, kUnitBytes);
        Tiles::add_bf16<5, 6, 7>();
        Tiles::load<6>(x + second, kRow);
        Tiles::add_bf16<3, 6, 7>();
        Tiles::load<6>(x, kRow);
        Tiles::add_bf16<1, 6, 7>();
      }
    }
  }

  const int tiles_, each_;
  const int64_t rows_;
  const uint8_t* x_;
  float* out_;
  const int64_t stride_;
};

// What all formats for tiles have in common. widen<kAsk>(layout, block, range, panel, prefetch, done) makes groups of
// a block bf16 and calls done(g) after each of them; if kAsk, it asks for what will be read later.
template <class S>
struct TileFormat {
  using Codec = TileCodec<S>;
  // With two tiles of sums each of columns and rows serves two others; a third saves a tile that is alone.
  static constexpr int kMaxRows = 32, kMaxRowsAlone = 48;
  // Activations that come from the second-level cache for every panel: of 2048 columns, ten tiles.
  static constexpr int64_t kPortionBytes = int64_t{5} << 18;
  static constexpr bool kOverwrites = true, kTiles = true;
  static constexpr bool kPacked = false;  // whether packed weights are what a panel would hold

  // One block times tiles of rows: see multiply.h.
  template <class Format, class Place>
  static KT_INLINE void multiply(const WeightLayout& layout, const uint8_t* block, int64_t groups,
                                 const TokenTile* tiles, int count, const EncodedTiles& encoded,
                                 Prefetch prefetch, Place&& place) {
    const RowRegisters registers(tiles[0].tokens, tiles[count - 1].tokens);
    if (count > 1) {
      several<Format>(registers, layout, block, groups, tiles, count, encoded, prefetch, place);
    } else {
      one<Format>(registers, layout, block, groups, tiles[0].tokens, encoded(tiles[0]), prefetch,
                  place(tiles[0]));
    }
  }

 protected:
  // Weights are made larger by half of what cutting a float off behind 16 bits takes from it on average: so
  // numbers of eight bits come out as they are, others as near as if they had been rounded to within a tenth.
  static constexpr float kUp = 1 + 0.7f / 256;

 private:
  // Sums stay in tiles from one end of the block to the other; a group is widened while the one before is multiplied.
  template <class Format>
  static KT_INLINE void one(const RowRegisters& registers, const WeightLayout& layout,
                            const uint8_t* block, int64_t groups, int rows, const uint8_t* tile,
                            Prefetch prefetch, float* out) {
    TilePanel<S, 4> panel;
    const TileSums<S, false> sums(registers, rows, tile, out);
    Ahead<S> nothing{block, 0, 1};
    const auto add = [&](int64_t g) {
      sums.add(g, 1, panel.group(g), nothing);
      if (!panel.scaled || ((g + 1) % panel.piece_groups != 0 && g + 1 != groups)) return;
      sums.end_scaled(panel.scale(g), g >= panel.piece_groups);
      sums.begin(false);
    };
    sums.begin(false);
    Format::template widen<true>(layout, block, {0, groups, groups}, panel, prefetch,
                                 [&](int64_t g) {
                                   if (g > 0) add(g - 1);
                                 });
    add(groups - 1);
    if (!panel.scaled) sums.end();
  }

  // Panel after panel of 32 KiB, each with tile after tile.
  template <class Format, class Place>
  static KT_INLINE void several(const RowRegisters& registers, const WeightLayout& layout,
                                const uint8_t* block, int64_t groups, const TokenTile* tiles,
                                int count, const EncodedTiles& encoded, Prefetch prefetch,
                                Place&& place) {
    constexpr int64_t kStep = 16;
    TilePanel<S, kStep> panel;
    // What is widened is asked for meanwhile, as with one tile; bf16 with every product, as there is much of it.
    const int64_t every = prefetch.panel_step;
    const int64_t lines =
        Format::kPacked ? every * ceil_div(ceil_div(layout.group_bytes(), 64 * every), count) : 0;
    for (int64_t first = 0; first < groups; first += kStep) {
      const Range range{first, groups - first < kStep ? groups - first : kStep, groups};
      const uint8_t* next = block + layout.group_at(first + kStep);
      Format::template widen<!Format::kPacked>(layout, block, range, panel, prefetch,
                                               [](int64_t) {});
      for (int i = 0; i < count; ++i) {
        const TileSums<S, true> sums(registers, tiles[i].tokens, encoded(tiles[i]),
                                     place(tiles[i]));
        Ahead<S> ahead{next + i * kStep * lines * 64, lines, every};
        if (!panel.scaled) {
          sums.begin(first > 0);
          sums.add(first, range.count, panel.group(first), ahead);
          sums.end();
          continue;
        }
        for (int64_t at = 0; at < range.count; at += panel.piece_groups) {
          const int64_t left = range.count - at;
          const int64_t piece = left < panel.piece_groups ? left : panel.piece_groups;
          sums.begin(false);
          sums.add(first + at, piece, panel.group(first + at), ahead);
          sums.end_scaled(panel.scale(first + at + piece - 1), first + at > 0);
        }
      }
    }
  }
};

template <class S>
struct TileBf16 : TileFormat<S> {
  using Fine = TileBf16;
  static constexpr bool kPacked = true;
  template <bool kAsk, class Panel, class Done>
  static KT_INLINE void widen(const WeightLayout&, const uint8_t* block, const Range& range,
                              Panel& panel, Prefetch prefetch, Done&& done) {
    panel.packed = block;
    const uint8_t* w = panel.group(range.first);
    for (int64_t g = 0; g < range.count; ++g, w += kTileGroupBytes) {
      if constexpr (kAsk) {
        for (int64_t at = 0; at < kTileGroupBytes; at += 64) {
          ask_ahead<S>(w + at, prefetch);
        }
      }
      done(range.first + g);
    }
  }
};

// Scales multiply sums, as they would leave numbers of four bits more than bf16 holds.
template <class S>
struct TileF8 : TileFormat<S> {
  using Fine = TileF8;
  template <bool kAsk, class Panel, class Done>
  static KT_INLINE void widen(const WeightLayout& layout, const uint8_t* block, const Range& range,
                              Panel& panel, Prefetch prefetch, Done&& done) {
    constexpr int kVectors = static_cast<int>(kBlockRows) / S::kLanes;
    panel.scaled = true;
    panel.piece_groups = piece_groups(layout);
    Groups<S, 1> groups(layout, 8 * kUnitBytes, block);
    for (int64_t g = range.first; g < range.first + range.count; ++g) {
      const uint8_t* w = groups.template begin<kVectors>(g, 0);
      for (int v = 0; v < kVectors; ++v) {
        S::store(panel.scale(g) + v * S::kLanes, groups.outer(0, v));
      }
      uint8_t* to = panel.place(g);
      for (int unit = 0; unit < 8; ++unit, w += kUnitBytes, to += 2 * kUnitBytes) {
        for (int64_t at = 0; at < kUnitBytes; at += S::kLanes * 4) {
          if constexpr (kAsk) ask_ahead<S>(w + at, prefetch);
          const typename S::I raw = S::load_i(w + at);
          S::store_i(to + at, S::template e4m3_pair<0>(raw));
          S::store_i(to + kUnitBytes + at, S::template e4m3_pair<1>(raw));
        }
      }
      done(g);
    }
  }
};

// Weights as in Coded (int16.h); with no set of scales they are of 8 bits and have a scale for each row,
// behind the block's groups.
template <class S, int kBits, bool kTable, int kSets>
struct TileCoded : TileFormat<S> {
  using Fine = TileCoded;
  static constexpr bool kRowScales = kSets == 0;
  using Code = Codes<S, kBits, kTable>;
  using Quad = ByteQuads<S>;
  using I = typename S::I;
  using F = typename S::F;

  template <bool kAsk, class Panel, class Done>
  static KT_INLINE void widen(const WeightLayout& layout, const uint8_t* block, const Range& range,
                              Panel& panel, Prefetch prefetch, Done&& done) {
    constexpr int kVectors = static_cast<int>(kBlockRows) / S::kLanes;
    const I levels = Quad::table(layout.levels);
    // A byte b becomes 1 + b / 256, as a float's bits; what it stands for is then a product and a sum away.
    const F start = S::set1(static_cast<float>(-256 - layout.byte_bias()));
    const F up = S::set1(TileFormat<S>::kUp), ratio = S::set1(256);
    Groups<S, kSets, Code::kNibbles && kSets == 2> groups(layout, Code::kBytes, block);
    const uint8_t* group = groups.template begin<kVectors>(range.first, 0);
    for (int64_t g = range.first;; group = groups.template next<kVectors>(0)) {
      for (int v = 0; v < kVectors; ++v) {
        F scale[2] = {up, up}, base[2];
        for (int set = 0; set < kSets; ++set) {
          scale[set] = S::mul(groups.scale(group, set, v), up);
        }
        for (int set = 0; set < (kSets == 2 ? 2 : 1); ++set) {
          base[set] = S::mul(scale[set], start);
          if (kSets > 0 && groups.has_offsets()) {
            base[set] = S::fma(groups.offset(group, set, v), up, base[set]);
          }
          scale[set] = S::mul(scale[set], ratio);
        }
        const int64_t at = v * S::kLanes * 4;
        widen_quads<kAsk>(group + at, levels, scale, base, panel.place(g) + at, prefetch,
                          std::make_integer_sequence<int, 8>());
      }
      done(g);
      if (++g == range.first + range.count) return;
    }
  }

 private:
  template <bool kAsk, int... Q>
  static KT_INLINE void widen_quads(const uint8_t* from, I levels, const F (&scale)[2],
                                    const F (&base)[2], uint8_t* to, Prefetch prefetch,
                                    std::integer_sequence<int, Q...>) {
    I units[Code::kUnits];
    (widen_quad<kAsk, Q>(from, units, levels, scale[kSets == 2 ? Q / 4 : 0],
                         base[kSets == 2 ? Q / 4 : 0], to, prefetch),
     ...);
  }
  template <bool kAsk, int Q>
  static KT_INLINE void widen_quad(const uint8_t* from, I (&units)[Code::kUnits], I levels, F scale,
                                   F base, uint8_t* to, Prefetch prefetch) {
    Code::template read<Q, kAsk>(units, from, prefetch);
    const I bytes = Code::template widen<Quad, Q>(units, levels);
    const auto pair = [&](F even, F odd) {
      return S::upper_halves(S::fma(even, scale, base), S::fma(odd, scale, base));
    };
    S::store_i(to + 2 * Q * kUnitBytes,
               pair(S::template one_and_byte<0>(bytes), S::template one_and_byte<1>(bytes)));
    S::store_i(to + (2 * Q + 1) * kUnitBytes,
               pair(S::template one_and_byte<2>(bytes), S::template one_and_byte<3>(bytes)));
  }
};

// Loops that reach the units' limits: see limits.h. Their numbers differ, as those of a model do: multiplying zeros
// takes less power, so that the processor runs at a higher clock.
static double spin_tiles(int64_t iterations, double operations, void (*step)()) {
  alignas(64) uint16_t numbers[512];  // bf16: 1 to 2, of either sign
  uint32_t random = 1;
  for (auto& number : numbers) {
    random = random * 1664525 + 1013904223;  // Numerical Recipes' generator
    number = static_cast<uint16_t>(0x3f80 | (random >> 16 & 0x807f));
  }
  const TileScope scope(2, 16);
  Tiles::zero<0>();
  Tiles::zero<1>();
  Tiles::zero<2>();
  Tiles::zero<3>();
  Tiles::load<4>(numbers, 64);
  Tiles::load<5>(numbers, 64);
  Tiles::load<6>(numbers, 64);
  Tiles::load<7>(numbers, 64);
  for (int64_t n = 0; n < iterations; ++n) step();
  return operations * 4 * 16 * 16 * static_cast<double>(iterations);
}
static double spin_tiles_bf16(int64_t iterations) {
  return spin_tiles(iterations, 2 * 32, [] {
    Tiles::add_bf16<0, 4, 6>();
    Tiles::add_bf16<1, 4, 7>();
    Tiles::add_bf16<2, 5, 6>();
    Tiles::add_bf16<3, 5, 7>();
  });
}
static double spin_tiles_int8(int64_t iterations) {
  return spin_tiles(iterations, 2 * 64, [] {
    Tiles::add_int8<0, 4, 6>();
    Tiles::add_int8<1, 4, 7>();
    Tiles::add_int8<2, 5, 6>();
    Tiles::add_int8<3, 5, 7>();
  });
}

}  // namespace ktcore::KTCORE_ISA
