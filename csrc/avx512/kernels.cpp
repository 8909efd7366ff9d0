#include "avx512/simd.h"
#include "kernels/table.inl"
