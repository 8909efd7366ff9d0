// Everything one instruction set offers. Compiled once per instruction set, after its simd.h, with
// KTCORE_ISA naming it: all that is defined here and below lives in a namespace of that name, and
// nothing shared is instantiated, so that no code of one set can be linked into another's path.
#include <cstring>
#include <limits>
#include <type_traits>

#include "common/kernel_table.h"
#include "common/packed.h"
#include "common/thread_pool.h"
#include "kernels/rows.h"
// (the order matters: each builds on the ones above)
#include "kernels/math.h"
#include "kernels/encode.h"
#include "kernels/formats.h"
#include "kernels/encode_tiles.h"
#include "kernels/moe.h"
#include "kernels/linear.h"
#include "kernels/route.h"
#include "kernels/convert.h"
#include "kernels/limits.h"

#define KTCORE_STRING_(x) #x
#define KTCORE_STRING(x) KTCORE_STRING_(x)

namespace ktcore::KTCORE_ISA {

template <class Format>
static constexpr FormatKernels kernels_of() {
  constexpr bool kInt16 = std::is_same_v<typename Format::Codec, Int16Codec<Simd>>;
  return {{gate_up<Simd, Format, Int16Codec<Simd>>, gate_up<Simd, Format, Bf16Codec<Simd>>},
          down<Simd, Format>,
          linear<Simd, Format>,
          kInt16 ? Encoding::int16 : Encoding::bf16,
          Format::kMaxRows,
          Format::kPlanes,
          Format::kExactPlanes,
          Format::Codec::row_bytes};
}

extern const KernelTable table;
// In the order of WeightFormat.
const KernelTable table = {
    KTCORE_STRING(KTCORE_ISA),
    {kernels_of<Bf16<Simd>>(), kernels_of<Int8Channel<Simd>>(), kernels_of<Int4Group32<Simd>>(),
     kernels_of<Coded<Simd, true, 1>>(), kernels_of<Coded<Simd, true, 2>>(),
     kernels_of<Coded<Simd, false, 1>>(), kernels_of<Coded<Simd, false, 2>>()},
    route<Simd>,
    dequantize<Simd>,
    quantize<Simd>,
    spin_int8<Simd>,
    spin_bf16<Simd>,
    spin_f32<Simd>,
    read<Simd>,
};

}  // namespace ktcore::KTCORE_ISA
