#include "common/isa.h"

#include <stdexcept>

#include "common/cpu_features.h"

namespace ktcore {

#define KTCORE_DECLARE(isa)       \
  namespace isa {                 \
  extern const KernelTable table; \
  }
#if defined(__x86_64__) || defined(_M_X64)
KTCORE_DECLARE(avx2)
KTCORE_DECLARE(avx2_vnni)
KTCORE_DECLARE(avx512)
KTCORE_DECLARE(avx512_vnni)
KTCORE_DECLARE(avx512_bf16)
KTCORE_DECLARE(amx)
#endif

const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = {
#if defined(__x86_64__) || defined(_M_X64)
      {"avx2", "avx2", {"avx2", "fma", "f16c"}, &avx2::table},
      {"avx2_vnni", "avx2", {"avx2", "fma", "f16c", "avx_vnni"}, &avx2_vnni::table},
      {"avx512", "avx512", {"avx512f", "avx512bw", "avx512dq", "avx512vl"}, &avx512::table},
      {"avx512_vnni",
       "avx512",
       {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"},
       &avx512_vnni::table},
      {"avx512_bf16",
       "avx512",
       {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512vbmi"},
       &avx512_bf16::table},
      {"amx",
       "amx",
       {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512vbmi",
        "amx_tile", "amx_bf16", "amx_int8"},
       &amx::table},
#endif
  };
  return all;
}

std::vector<std::string> Isa::missing() const {
  std::vector<std::string> out;
  for (const char* feature : requires_) {
    if (!cpu_has(feature)) out.emplace_back(feature);
  }
  return out;
}

const KernelTable& kernels(const std::string& name) {
  for (const Isa& isa : isas()) {
    if (name != isa.name) continue;
    const auto missing = isa.missing();
    if (missing.empty()) return *isa.table;
    std::string list;
    for (const auto& feature : missing) list += (list.empty() ? "" : ", ") + feature;
    throw std::runtime_error("instruction set '" + name + "' cannot run here: this machine lacks " +
                             list);
  }
  throw std::invalid_argument("unknown instruction set '" + name + "'");
}

}  // namespace ktcore
