#include "common/cpu_features.h"

#if defined(__x86_64__) || defined(_M_X64)
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace ktcore {
namespace {

#if defined(__x86_64__) || defined(_M_X64)

struct Regs {
  uint32_t r[4];  // eax, ebx, ecx, edx
};
enum { EAX, EBX, ECX, EDX };

Regs cpuid(uint32_t leaf, uint32_t subleaf) {
  Regs out{};
#if defined(_MSC_VER)
  int r[4];
  __cpuid(r, static_cast<int>(leaf & 0x80000000u));
  if (static_cast<uint32_t>(r[0]) < leaf) return out;
  __cpuidex(r, static_cast<int>(leaf), static_cast<int>(subleaf));
  for (int i = 0; i < 4; ++i) out.r[i] = static_cast<uint32_t>(r[i]);
#else
  __get_cpuid_count(leaf, subleaf, &out.r[0], &out.r[1], &out.r[2], &out.r[3]);
#endif
  return out;
}

uint64_t xcr0() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  uint32_t lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (static_cast<uint64_t>(hi) << 32) | lo;
#endif
}

// Linux hands out the 8 KiB of tile registers per process, on request.
bool amx_permitted() {
#if defined(__linux__)
  constexpr long kArchReqXcompPerm = 0x1023;
  constexpr long kXfeatureXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
#else
  return true;  // elsewhere XCR0 alone decides
#endif
}

std::vector<CpuFeature> detect() {
  const Regs l1 = cpuid(1, 0), l7 = cpuid(7, 0), l71 = cpuid(7, 1);
  const bool osxsave = (l1.r[ECX] >> 27) & 1;
  const uint64_t state = osxsave ? xcr0() : 0;
  const bool ymm = (state & 0x6) == 0x6;
  const bool zmm = (state & 0xe6) == 0xe6;
  const bool has_tile = (l7.r[EDX] >> 24) & 1;
  const bool tile = (state & 0x60000) == 0x60000 && has_tile && amx_permitted();
  const auto bit = [](const Regs& l, int reg, int n) { return ((l.r[reg] >> n) & 1) != 0; };
  return {
      {"sse4_2", bit(l1, ECX, 20), true},     {"avx", bit(l1, ECX, 28), ymm},
      {"avx2", bit(l7, EBX, 5), ymm},         {"fma", bit(l1, ECX, 12), ymm},
      {"f16c", bit(l1, ECX, 29), ymm},        {"avx_vnni", bit(l71, EAX, 4), ymm},
      {"avx512f", bit(l7, EBX, 16), zmm},     {"avx512bw", bit(l7, EBX, 30), zmm},
      {"avx512dq", bit(l7, EBX, 17), zmm},    {"avx512vl", bit(l7, EBX, 31), zmm},
      {"avx512_vnni", bit(l7, ECX, 11), zmm}, {"avx512_bf16", bit(l71, EAX, 5), zmm},
      {"avx512vbmi", bit(l7, ECX, 1), zmm},   {"avx512_fp16", bit(l7, EDX, 23), zmm},
      {"amx_tile", has_tile, tile},           {"amx_int8", bit(l7, EDX, 25), tile},
      {"amx_bf16", bit(l7, EDX, 22), tile},   {"amx_fp16", bit(l71, EAX, 21), tile},
  };
}

// Family 25 is Zen 3 and Zen 4, which of the two alone has AVX-512.
Processor detect_processor() {
  const Regs vendor = cpuid(0, 0), l1 = cpuid(1, 0), l7 = cpuid(7, 0);
  const bool amd =
      vendor.r[EBX] == 0x68747541 && vendor.r[EDX] == 0x69746e65 && vendor.r[ECX] == 0x444d4163;
  const uint32_t family = (l1.r[EAX] >> 8 & 15) + (l1.r[EAX] >> 20 & 255);
  if (!amd) return Processor::other;
  return family == 25 && (l7.r[EBX] >> 16 & 1) != 0 ? Processor::zen4 : Processor::amd;
}

#else
std::vector<CpuFeature> detect() { return {}; }
Processor detect_processor() { return Processor::other; }
#endif

}  // namespace

const std::vector<CpuFeature>& cpu_features() {
  static const std::vector<CpuFeature> features = [] {
    auto found = detect();
#if defined(KTCORE_EMULATE_AVX512)
    // The kernels compiled for these contain AVX2 instructions only.
    for (CpuFeature& f : found) {
      if (std::string(f.name).starts_with("avx512")) f.cpu = f.os = true;
    }
#endif
#if defined(KTCORE_EMULATE_AMX)
    for (CpuFeature& f : found) {
      const std::string name = f.name;
      if (name == "amx_tile" || name == "amx_bf16" || name == "amx_int8") f.cpu = f.os = true;
    }
#endif
    return found;
  }();
  return features;
}

bool cpu_has(const std::string& name) {
  for (const CpuFeature& f : cpu_features()) {
    if (name == f.name) return f.usable();
  }
  return false;
}

Processor processor() {
  static const Processor it = detect_processor();
  return it;
}

}  // namespace ktcore
