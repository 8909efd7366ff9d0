// The product of a block with tiles of activations, in whichever of a format's ways is the faster: see formats/block.h.
#pragma once

namespace ktcore::KTCORE_ISA {

// The most rows of a tile that is an expert's only one.
template <class Format>
static constexpr int max_rows_alone() {
  if constexpr (requires { Format::kMaxRowsAlone; }) return Format::kMaxRowsAlone;
  return Format::kMaxRows;
}

// Calls dot<R> for a run-time R.
template <class S, class Format, int R = max_rows_alone<Format>()>
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

// Whether the sums of all columns are left to be scaled, whatever the layout says.
template <class Format>
static constexpr bool kHasRowScales = [] {
  if constexpr (requires { Format::kRowScales; }) return Format::kRowScales;
  return false;
}();

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
  if (kHasRowScales<Format> || layout.row_scales) {
    scale_rows<S>(block + layout.row_scales_at(groups), out, rows);
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

// The same for tiles that are fine or not, all of them alike.
template <class S, class Format, class... Args>
static KT_INLINE void multiply_alike(bool fine, Args&&... args) {
  if constexpr (!std::is_same_v<typename Format::Fine, Format>) {
    if (fine) return multiply<S, typename Format::Fine>(args...);
  }
  multiply<S, Format>(args...);
}

}  // namespace ktcore::KTCORE_ISA
