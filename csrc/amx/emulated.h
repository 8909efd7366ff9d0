// The tile instructions that amx/tiles.h uses, on a processor without AMX, as the operations of Intel's manual
// describe them. For development only (-DKTCORE_EMULATE_AMX=ON); it says nothing about speed.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace ktcore::emulated {

class TileRegisters {
 public:
  void configure(const uint8_t* rows, const uint16_t* row_bytes) {
    for (int t = 0; t < 8; ++t) {
      Tile& tile = tiles_[t];
      tile = {};
      tile.rows = rows[t];
      tile.row_bytes = row_bytes[t];
      if (tile.rows > 16 || tile.row_bytes > 64) throw std::logic_error("tile too large");
    }
  }
  void zero(int t) { std::memset(used(t).bytes, 0, sizeof(tiles_[t].bytes)); }
  void load(int t, const void* p, int64_t stride) {
    Tile& tile = used(t);
    std::memset(tile.bytes, 0, sizeof(tile.bytes));
    for (int r = 0; r < tile.rows; ++r) {
      std::memcpy(tile.bytes[r], static_cast<const uint8_t*>(p) + r * stride, tile.row_bytes);
    }
  }
  void store(int t, void* p, int64_t stride) {
    const Tile& tile = used(t);
    for (int r = 0; r < tile.rows; ++r) {
      std::memcpy(static_cast<uint8_t*>(p) + r * stride, tile.bytes[r], tile.row_bytes);
    }
  }
  // TDPBF16PS: the even and the odd products of a row are two sums, numbers too small for a normal one are 0.
  void add_bf16(int sum, int rows, int columns) {
    each(sum, rows, columns, [&](int r, int n, int pairs) {
      float even = 0, odd = 0;
      for (int k = 0; k < pairs; ++k) {
        even = flush(std::fma(bf16(rows, r, 2 * k), bf16(columns, k, 2 * n), even));
        odd = flush(std::fma(bf16(rows, r, 2 * k + 1), bf16(columns, k, 2 * n + 1), odd));
      }
      float total;
      std::memcpy(&total, tiles_[sum].bytes[r] + 4 * n, 4);
      total = flush(flush(total) + flush(even + odd));
      std::memcpy(tiles_[sum].bytes[r] + 4 * n, &total, 4);
    });
  }
  // TDPBSSD, whose sums wrap.
  void add_int8(int sum, int rows, int columns) {
    each(sum, rows, columns, [&](int r, int n, int quads) {
      uint32_t total;
      std::memcpy(&total, tiles_[sum].bytes[r] + 4 * n, 4);
      for (int k = 0; k < 4 * quads; ++k) {
        const auto a = static_cast<int8_t>(tiles_[rows].bytes[r][k]);
        const auto b = static_cast<int8_t>(tiles_[columns].bytes[k / 4][4 * n + k % 4]);
        total += static_cast<uint32_t>(a * b);
      }
      std::memcpy(tiles_[sum].bytes[r] + 4 * n, &total, 4);
    });
  }

 private:
  struct Tile {
    int rows = 0, row_bytes = 0;
    uint8_t bytes[16][64] = {};
  };

  // What the processor would not execute is an error.
  Tile& used(int t) {
    if (tiles_[t].rows == 0 || tiles_[t].row_bytes == 0) throw std::logic_error("unused tile");
    return tiles_[t];
  }
  template <class F>
  void each(int sum, int rows, int columns, F&& f) {
    const Tile &c = used(sum), &a = used(rows), &b = used(columns);
    if (a.rows != c.rows || b.row_bytes != c.row_bytes || b.rows * 4 != a.row_bytes) {
      throw std::logic_error("tiles that do not fit each other");
    }
    for (int r = 0; r < c.rows; ++r) {
      for (int n = 0; n < c.row_bytes / 4; ++n) f(r, n, b.rows);
    }
  }
  float bf16(int tile, int row, int at) const {
    uint16_t half;
    std::memcpy(&half, tiles_[tile].bytes[row] + 2 * at, 2);
    return flush(std::bit_cast<float>(static_cast<uint32_t>(half) << 16));
  }
  static float flush(float v) {
    return std::fpclassify(v) == FP_SUBNORMAL ? std::copysign(0.0f, v) : v;
  }

  Tile tiles_[8];
};

inline thread_local TileRegisters tiles;

}  // namespace ktcore::emulated
