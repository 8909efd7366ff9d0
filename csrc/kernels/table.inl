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
#include "kernels/quads.h"
#include "kernels/encode.h"
#include "kernels/formats.h"
#include "kernels/encode_tiles.h"
#include "kernels/moe.h"
#include "kernels/linear.h"
#include "kernels/route.h"
#include "kernels/norm.h"
#include "kernels/rotary.h"
#include "kernels/attention.h"
#include "kernels/convert.h"
#include "kernels/limits.h"

#define KTCORE_STRING_(x) #x
#define KTCORE_STRING(x) KTCORE_STRING_(x)

namespace ktcore::KTCORE_ISA {

template <class Codec>
static constexpr Encoding encoding_of() {
  if constexpr (std::is_same_v<Codec, Int16Codec<Simd>>) return Encoding::int16;
  if constexpr (std::is_same_v<Codec, FloatCodec<Simd>>) return Encoding::f32;
  return Encoding::bf16;
}

template <class Format>
static constexpr auto gate_up_into_bf16() -> void (*)(const MoeJob&, ThreadPool&) {
  if constexpr (Simd::kBf16Dot) return gate_up<Simd, Format, Bf16Codec<Simd>>;
  return nullptr;
}

template <class Format>
static constexpr FormatKernels kernels_of() {
  return {{gate_up<Simd, Format, Int16Codec<Simd>>, gate_up<Simd, Format, FloatCodec<Simd>>,
           gate_up_into_bf16<Format>()},
          down<Simd, Format>,
          linear<Simd, Format>,
          encoding_of<typename Format::Codec>(),
          Format::kMaxRows,
          Format::kPlanes,
          Format::kExactPlanes,
          Format::Codec::row_bytes};
}

extern const KernelTable table;
// In the order of WeightFormat.
const KernelTable table = {
    KTCORE_STRING(KTCORE_ISA),
    {kernels_of<Bf16<Simd>>(), kernels_of<Floats<Simd, FromF16<Simd>>>(),
     kernels_of<Floats<Simd, FromF32<Simd>>>(), kernels_of<F8<Simd>>(),
     kernels_of<Int8Channel<Simd>>(), kernels_of<Coded<Simd, 2, false, 1>>(),
     kernels_of<Coded<Simd, 2, false, 2>>(), kernels_of<Coded<Simd, 3, false, 1>>(),
     kernels_of<Coded<Simd, 3, false, 2>>(), kernels_of<Coded<Simd, 4, false, 1>>(),
     kernels_of<Coded<Simd, 4, false, 2>>(), kernels_of<Coded<Simd, 5, false, 1>>(),
     kernels_of<Coded<Simd, 5, false, 2>>(), kernels_of<Coded<Simd, 6, false, 1>>(),
     kernels_of<Coded<Simd, 6, false, 2>>(), kernels_of<Coded<Simd, 8, false, 1>>(),
     kernels_of<Coded<Simd, 8, false, 2>>(), kernels_of<Coded<Simd, 4, true, 1>>(),
     kernels_of<Coded<Simd, 4, true, 2>>()},
    route<Simd>,
    rms_norm<Simd>,
    rotary<Simd>,
    store_kv<Simd>,
    attention<Simd>,
    dequantize<Simd>,
    quantize<Simd>,
    spin_int8<Simd>,
    spin_bf16<Simd>,
    spin_f32<Simd>,
    read<Simd>,
};

}  // namespace ktcore::KTCORE_ISA
