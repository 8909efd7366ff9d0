#include "common/numa.h"

#include <mutex>
#include <utility>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ktcore {
namespace {

struct Nodes {
  std::mutex mutex;
  std::vector<int> spread;
  Nodes() {
    auto allowed = allowed_nodes();
    if (allowed.size() > 1) spread = std::move(allowed);
  }
};
Nodes& nodes() {
  static Nodes* const instance = new Nodes;  // leaked: buffers may be made while a process exits
  return *instance;
}

#if defined(__linux__)
// From linux/mempolicy.h. Called without libnuma, which few machines have installed.
constexpr int kInterleave = 3, kMemsAllowed = 4;
constexpr int kMaxNodes = 1024, kBits = 8 * sizeof(unsigned long);
#endif

}  // namespace

std::vector<int> allowed_nodes() {
  std::vector<int> out;
#if defined(__linux__)
  unsigned long mask[kMaxNodes / kBits] = {};
  if (syscall(SYS_get_mempolicy, nullptr, mask, kMaxNodes, nullptr, kMemsAllowed) == 0) {
    for (int i = 0; i < kMaxNodes; ++i) {
      if (mask[i / kBits] >> (i % kBits) & 1) out.push_back(i);
    }
  }
#endif
  if (out.empty()) out.push_back(0);
  return out;
}

void set_memory_nodes(std::vector<int> spread) {
  std::lock_guard<std::mutex> guard(nodes().mutex);
  nodes().spread = std::move(spread);
}

std::vector<int> memory_nodes() {
  std::lock_guard<std::mutex> guard(nodes().mutex);
  return nodes().spread;
}

void interleave([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  const std::vector<int> spread = memory_nodes();
  if (spread.empty()) return;
  unsigned long mask[kMaxNodes / kBits] = {};
  for (const int node : spread) {
    if (node >= 0 && node < kMaxNodes) mask[node / kBits] |= 1ul << (node % kBits);
  }
  syscall(SYS_mbind, data, bytes, kInterleave, mask, kMaxNodes + 1, 0);
#endif
}

}  // namespace ktcore
