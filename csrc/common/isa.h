// The instruction sets this build has kernels for. To add one: a simd.h, a line here, a line in
// CMakeLists.txt.
#pragma once

#include <string>
#include <vector>

#include "common/kernel_table.h"

namespace ktcore {

struct Isa {
  const char* name;
  const char* backend;                 // the Python backend that offers it
  std::vector<const char*> requires_;  // CPU features, as cpu_features() names them
  const KernelTable* table;

  std::vector<std::string> missing() const;
};

// Most capable last, within each backend.
const std::vector<Isa>& isas();

// The kernels of an instruction set. Throws std::invalid_argument for an unknown name and
// std::runtime_error for one that this machine cannot execute: no kernel is ever entered on a
// processor that would fault on it.
const KernelTable& kernels(const std::string& isa);

}  // namespace ktcore
