#include "avx2/simd.h"
#include "kernels/table.inl"
