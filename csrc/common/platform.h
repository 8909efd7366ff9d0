// The one place for compiler and operating-system differences, so that the rest stays plain C++20.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(_MSC_VER) && !defined(__clang__)
#define KT_INLINE __forceinline
#define KT_NOINLINE __declspec(noinline)
#else
#define KT_INLINE inline __attribute__((always_inline))
#define KT_NOINLINE __attribute__((noinline))
#endif

// Full unrolling of the register-blocked loops: without it the accumulators live in memory.
#if defined(__clang__)
#define KT_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define KT_UNROLL _Pragma("GCC unroll 32")
#else
#define KT_UNROLL
#endif

// Has a vector that several operations use loaded into a register once: compilers like to fold the
// load into each of them, which binds a loop to its load ports.
#if defined(__GNUC__) && !defined(KTCORE_EMULATE_AVX512)
#define KT_ASM  // vector instructions may be written as assembly
#define KT_IN_REGISTER(v) __asm__("" : "+v"(v))
#else
#define KT_IN_REGISTER(v) (void)(v)
#endif

namespace ktcore {

// Internal linkage on purpose: these are compiled once per instruction set, and a shared inline
// definition could end up holding AVX-512 code that a smaller CPU then runs.
static constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
static constexpr int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

void cpu_relax();  // a hint to the core inside a spin loop

}  // namespace ktcore
