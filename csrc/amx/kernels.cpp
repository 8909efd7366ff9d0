#include "avx512/simd.h"
// (the order matters)
#include "amx/tiles.h"
#define KTCORE_TILES
#include "kernels/table.inl"
