// A checksum that keeps up with memory: whether bytes on a disk are still what was written.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ktcore {

// 64 bits, computed on the pool; the same for any number of threads. Finds damage, for which
// changing any one aligned word always changes it; it is no defence against forgery.
uint64_t checksum(const uint8_t* data, size_t bytes);

}  // namespace ktcore
