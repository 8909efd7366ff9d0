// Everything one instruction set offers. Compiled once per instruction set, after its simd.h, with
// KTCORE_ISA naming it: all that is defined here and below lives in a namespace of that name, and
// nothing shared is instantiated, so that no code of one set can be linked into another's path.
#include <math.h>

#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "common/kernel_table.h"
#include "common/packed.h"
#include "common/thread_pool.h"
#include "kernels/rows.h"
// (the order matters: each builds on the ones above)
#include "kernels/math.h"
#include "kernels/encode.h"
#include "kernels/formats/block.h"
#include "kernels/formats/groups.h"
#include "kernels/formats/quads.h"
#include "kernels/formats/codes.h"
#include "kernels/formats/int16.h"
#include "kernels/formats/floats.h"
#include "kernels/formats/bf16_int16.h"
#include "kernels/formats/bf16_dot.h"
#include "kernels/formats/bytes.h"
#include "kernels/formats/short_sums.h"
#include "kernels/formats/short_sums_g16.h"
#if defined(KTCORE_TILES)
#include "kernels/formats/tiles.h"
#endif
#include "kernels/encode_tiles.h"
#include "kernels/multiply.h"
#include "kernels/moe.h"
#include "kernels/linear.h"
#include "kernels/route.h"
#include "kernels/norm.h"
#include "kernels/rotary.h"
#if defined(KTCORE_TILES)
#include "kernels/attention_tiles.h"
#endif
#include "kernels/attention.h"
#include "kernels/convert.h"
#include "kernels/limits.h"

#define KTCORE_STRING_(x) #x
#define KTCORE_STRING(x) KTCORE_STRING_(x)

namespace ktcore::KTCORE_ISA {

// Whether codes of so many bits can be multiplied with activations of eight.
static constexpr bool takes_bytes(int bits, bool table) {
  return Simd::kByteDots || (bits <= 6 && !table);
}

template <class Format>
static constexpr bool kHasFine = !std::is_same_v<typename Format::Fine, Format>;

template <class Format>
static constexpr decltype(FormatKernels::down) down_of() {
  if constexpr (!kHasFine<Format>) return down<Simd, Format>;
  return nullptr;
}
template <class Format>
static constexpr decltype(FormatKernels::encode_mid) encode_mid_of() {
  if constexpr (!kHasFine<Format>) return encode_columns<Simd, typename Format::Codec>;
  return nullptr;
}
// Of a row of an encoded tile, whichever its tokens.
template <class Format>
static int64_t row_bytes_of(int64_t cols) {
  return token_bytes_of<Format>(1, cols);
}

template <class Format, int kPlanes = 1>
static constexpr FormatKernels kernels_of() {
  return {encode_tokens<Simd, Format>, gate_up<Simd, Format>,    encode_mid_of<Format>(),
          down_of<Format>(),           linear<Simd, Format>,     Format::kMaxRows,
          max_rows_alone<Format>(),    tiles_of_portion<Format>, kPlanes,
          row_bytes_of<Format>,        kHasFine<Format>};
}

// Integers times activations of eight bits, where these will do and byte dot products are exact; else of
// sixteen, which are nearly exact.
template <Accuracy kAccuracy, int kBits, bool kTable, int kSets>
static constexpr FormatKernels coded() {
  if constexpr (!takes_bytes(kBits, kTable) || kAccuracy != Accuracy::int8) {
    return kernels_of<Coded<Simd, Codes<Simd, kBits, kTable>, kSets>>();
  } else if constexpr (kBits <= 5 && !kTable && kSets == 1) {
    return kernels_of<ShortCoded<Simd, kBits>>();
  } else if constexpr (kBits <= 3 && !kTable && kSets == 2) {
    return kernels_of<ShortCodedG16<Simd, kBits>>();
  } else {
    return kernels_of<ByteCoded<Simd, kBits, kTable, kSets>>();
  }
}
// Floats by dot products of bf16, with two planes of activations where results are to be exact; else as integers of
// 16 bits, or as float32.
template <Accuracy kAccuracy, class Pairs, class Integers, class Columns>
static constexpr FormatKernels floats() {
  if constexpr (Simd::kBf16Dot) {
    return kernels_of<Bf16Pairs<Simd, Pairs>, kAccuracy == Accuracy::exact ? 2 : 1>();
  } else if constexpr (kFloatsAsInt16<Simd> && kAccuracy != Accuracy::exact) {
    return kernels_of<Integers>();
  } else {
    return kernels_of<Floats<Simd, Columns>>();
  }
}
template <Accuracy kAccuracy>
static constexpr FormatKernels bf16() {
  return floats<kAccuracy, PairsFromBf16<Simd>, Bf16Words<Simd>, FromBf16<Simd>>();
}
template <Accuracy kAccuracy>
static constexpr FormatKernels f8() {
  return floats<kAccuracy, PairsFromF8<Simd>, Coded<Simd, F8Codes<Simd>, 1>, FromF8<Simd>>();
}
template <Accuracy kAccuracy>
static constexpr FormatKernels int8() {
  if constexpr (takes_bytes(8, false) && kAccuracy == Accuracy::int8) {
    return kernels_of<ByteCoded<Simd, 8, false, 0>>();
  } else {
    return kernels_of<Int8Channel<Simd>>();
  }
}

// In the order of WeightFormat.
template <Accuracy kAccuracy>
static constexpr AllFormats all_formats() {
  return {{bf16<kAccuracy>(),
           kernels_of<Floats<Simd, FromF16<Simd>>>(),
           kernels_of<Floats<Simd, FromF32<Simd>>>(),
           f8<kAccuracy>(),
           int8<kAccuracy>(),
           coded<kAccuracy, 2, false, 1>(),
           coded<kAccuracy, 2, false, 2>(),
           coded<kAccuracy, 3, false, 1>(),
           coded<kAccuracy, 3, false, 2>(),
           coded<kAccuracy, 4, false, 1>(),
           coded<kAccuracy, 4, false, 2>(),
           coded<kAccuracy, 5, false, 1>(),
           coded<kAccuracy, 5, false, 2>(),
           coded<kAccuracy, 6, false, 1>(),
           coded<kAccuracy, 6, false, 2>(),
           coded<kAccuracy, 8, false, 1>(),
           coded<kAccuracy, 8, false, 2>(),
           coded<kAccuracy, 3, true, 1>(),
           coded<kAccuracy, 3, true, 2>(),
           coded<kAccuracy, 4, true, 1>(),
           coded<kAccuracy, 4, true, 2>()}};
}
#if defined(KTCORE_TILES)
// Where results need not be exact. bf16 has no room for float16's numbers; NVFP4's weights would fit, but a small layer
// came out beyond its tolerance with activations of bf16.
static constexpr AllFormats kInTiles = {{kernels_of<TileBf16<Simd>>(),
                                         kernels_of<Floats<Simd, FromF16<Simd>>>(),
                                         kernels_of<Floats<Simd, FromF32<Simd>>>(),
                                         kernels_of<TileF8<Simd>>(),
                                         kernels_of<TileCoded<Simd, 8, false, 0>>(),
                                         kernels_of<TileCoded<Simd, 2, false, 1>>(),
                                         kernels_of<TileCoded<Simd, 2, false, 2>>(),
                                         kernels_of<TileCoded<Simd, 3, false, 1>>(),
                                         kernels_of<TileCoded<Simd, 3, false, 2>>(),
                                         kernels_of<TileCoded<Simd, 4, false, 1>>(),
                                         kernels_of<TileCoded<Simd, 4, false, 2>>(),
                                         kernels_of<TileCoded<Simd, 5, false, 1>>(),
                                         kernels_of<TileCoded<Simd, 5, false, 2>>(),
                                         kernels_of<TileCoded<Simd, 6, false, 1>>(),
                                         kernels_of<TileCoded<Simd, 6, false, 2>>(),
                                         kernels_of<TileCoded<Simd, 8, false, 1>>(),
                                         kernels_of<TileCoded<Simd, 8, false, 2>>(),
                                         kernels_of<TileCoded<Simd, 3, true, 1>>(),
                                         kernels_of<TileCoded<Simd, 3, true, 2>>(),
                                         kernels_of<TileCoded<Simd, 4, true, 1>>(),
                                         coded<Accuracy::bf16, 4, true, 2>()}};
static constexpr AllFormats kBf16 = kInTiles, kInt8 = kInTiles;
static double spin_bytes(int64_t iterations) { return spin_tiles_int8(iterations); }
static double spin_pairs(int64_t iterations) { return spin_tiles_bf16(iterations); }
#else
static constexpr AllFormats kBf16 = all_formats<Accuracy::bf16>();
static constexpr AllFormats kInt8 = all_formats<Accuracy::int8>();
static double spin_bytes(int64_t iterations) { return spin_int8<Simd>(iterations); }
static double spin_pairs(int64_t iterations) { return spin_bf16<Simd>(iterations); }
#endif

extern const KernelTable table;
const KernelTable table = {
    KTCORE_STRING(KTCORE_ISA),
    Simd::kBf16Dot         ? "bf16"
    : kFloatsAsInt16<Simd> ? "int16"
                           : "float32",
    {all_formats<Accuracy::exact>(), kBf16, kInt8},
    route<Simd>,
    rms_norm<Simd>,
    rotary<Simd>,
    store_kv<Simd>,
    attention<Simd>,
    dequantize<Simd>,
    quantize<Simd>,
    spin_bytes,
    spin_pairs,
    spin_f32<Simd>,
    read<Simd>,
};

}  // namespace ktcore::KTCORE_ISA
