// Tiles of AMX: eight registers of up to 16 rows of 64 bytes, which one instruction multiplies and adds up.
// (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.)
#pragma once

#include <cstdint>
#include <cstring>

#if defined(KTCORE_EMULATE_AMX)
#include "amx/emulated.h"
#elif !defined(__GNUC__)
#include <immintrin.h>
#endif

#include "common/platform.h"

namespace ktcore::KTCORE_ISA {

// How many rows and bytes of each tile are used.
struct alignas(64) TileConfig {
  uint8_t palette = 0, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

// The instructions. With GCC and Clang as assembly: GCC's own macros take literals alone as a tile's number,
// and do not say that a configuration is read from memory.
struct Tiles {
#if defined(KTCORE_EMULATE_AMX)
  static void configure(const TileConfig& c) { emulated::tiles.configure(c.rows, c.row_bytes); }
  static TileConfig configuration() { return {}; }
  static void release() {}
  template <int T>
  static void zero() {
    emulated::tiles.zero(T);
  }
  template <int T>
  static void load(const void* p, int64_t stride) {
    emulated::tiles.load(T, p, stride);
  }
  template <int T>
  static void stream(const void* p, int64_t stride) {
    load<T>(p, stride);
  }
  template <int T>
  static void store(void* p, int64_t stride) {
    emulated::tiles.store(T, p, stride);
  }
  template <int kSum, int kRows, int kColumns>
  static void add_bf16() {
    emulated::tiles.add_bf16(kSum, kRows, kColumns);
  }
  template <int kSum, int kRows, int kColumns>
  static void add_int8() {
    emulated::tiles.add_int8(kSum, kRows, kColumns);
  }
#elif defined(__GNUC__)
  static KT_INLINE void configure(const TileConfig& config) {
    __asm__ volatile("ldtilecfg %0" : : "m"(config) : "memory");
  }
  static KT_INLINE TileConfig configuration() {
    TileConfig config;
    __asm__ volatile("sttilecfg %0" : "=m"(config));
    return config;
  }
  static KT_INLINE void release() { __asm__ volatile("tilerelease" : : : "memory"); }
  template <int T>
  static KT_INLINE void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(T));
  }
  template <int T>
  static KT_INLINE void load(const void* p, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
  }
  // The same, of what the first-level cache need not keep.
  template <int T>
  static KT_INLINE void stream(const void* p, int64_t stride) {
    __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  static KT_INLINE void store(void* p, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory");
  }
  // Adds to a tile of sums the products of rows of pairs (or quads) with columns of such.
  template <int kSum, int kRows, int kColumns>
  static KT_INLINE void add_bf16() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0"
                     :
                     : "i"(kSum), "i"(kRows), "i"(kColumns));
  }
  template <int kSum, int kRows, int kColumns>
  static KT_INLINE void add_int8() {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0"
                     :
                     : "i"(kSum), "i"(kRows), "i"(kColumns));
  }
#else
  static KT_INLINE void configure(const TileConfig& config) { _tile_loadconfig(&config); }
  static KT_INLINE TileConfig configuration() {
    TileConfig config;
    _tile_storeconfig(&config);
    return config;
  }
  static KT_INLINE void release() { _tile_release(); }
  template <int T>
  static KT_INLINE void zero() {
    _tile_zero(T);
  }
  template <int T>
  static KT_INLINE void load(const void* p, int64_t stride) {
    _tile_loadd(T, p, stride);
  }
  template <int T>
  static KT_INLINE void stream(const void* p, int64_t stride) {
    _tile_stream_loadd(T, p, stride);
  }
  template <int T>
  static KT_INLINE void store(void* p, int64_t stride) {
    _tile_stored(T, p, stride);
  }
  template <int kSum, int kRows, int kColumns>
  static KT_INLINE void add_bf16() {
    _tile_dpbf16ps(kSum, kRows, kColumns);
  }
  template <int kSum, int kRows, int kColumns>
  static KT_INLINE void add_int8() {
    _tile_dpbssd(kSum, kRows, kColumns);
  }
#endif
};

// Registers for the sums of one to three tiles of so many rows with two tiles of 16 columns, until the end of the
// block: 2 i + j for rows i and columns j. Of the others, rows are in 4 and 5 and columns in 6 and 7; where there
// are three tiles, they are in 6 and in 7. Then what was in use before is so again: other libraries on this
// thread remember what they have configured.
class TileScope {
 public:
  TileScope(int tiles, int rows) : before_(Tiles::configuration()) {
    TileConfig config;
    config.palette = 1;
    for (int t = 0; t < 8; ++t) {
      const bool columns = t == 7 || (t == 6 && tiles < 3);
      const int used = columns ? 16 : t < 2 * tiles || t >= 4 ? rows : 0;
      config.rows[t] = static_cast<uint8_t>(used);
      config.row_bytes[t] = used > 0 ? 64 : 0;
    }
    Tiles::configure(config);
  }
  ~TileScope() {
    if (before_.palette == 0) {
      Tiles::release();
    } else {
      Tiles::configure(before_);
    }
  }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  TileConfig before_;
};

}  // namespace ktcore::KTCORE_ISA
