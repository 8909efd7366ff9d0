// What the processor can do and what the operating system has switched on: both are needed before
// an instruction may be issued.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ktcore {

struct CpuFeature {
  const char* name;  // as Linux names it in /proc/cpuinfo
  bool cpu;          // CPUID says the processor implements it
  bool os;           // the operating system saves its registers (XCR0, AMX permission)
  bool usable() const { return cpu && os; }
};

const std::vector<CpuFeature>& cpu_features();
bool cpu_has(const std::string& name);

// What its prefetchers are known to want: see engine.cpp.
enum class Processor { zen4, amd, other };
Processor processor();

}  // namespace ktcore
