#include "common/numa.h"

#include <cstdint>
#include <cstdio>
#include <mutex>
#include <string>
#include <utility>

#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ktcore {
namespace {

#if defined(__linux__)
// From linux/mempolicy.h. Called without libnuma, which few machines have installed.
constexpr int kPreferred = 1, kInterleave = 3, kMemsAllowed = 4;
constexpr int kMaxNodes = 1024, kBits = 8 * sizeof(unsigned long);

void set_policy(void* data, size_t bytes, int policy, const std::vector<int>& of) {
  unsigned long mask[kMaxNodes / kBits] = {};
  bool any = false;
  for (const int node : of) {
    if (node < 0 || node >= kMaxNodes) continue;
    mask[node / kBits] |= 1ul << (node % kBits);
    any = true;
  }
  if (any) syscall(SYS_mbind, data, bytes, policy, mask, kMaxNodes + 1, 0);
}

// The CPUs of a node that the calling thread may use; false if there are none, or none are known.
bool usable_cpus(int node, cpu_set_t& cpus) {
  CPU_ZERO(&cpus);
  cpu_set_t allowed;
  if (node < 0 || sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return false;
  const std::string path = "/sys/devices/system/node/node" + std::to_string(node) + "/cpulist";
  std::FILE* file = std::fopen(path.c_str(), "r");
  if (file == nullptr) return false;
  for (int first; std::fscanf(file, "%d", &first) == 1;) {  // "0-15,32-47"
    int last = first, next = std::fgetc(file);
    if (next == '-' && std::fscanf(file, "%d", &last) == 1) next = std::fgetc(file);
    for (int cpu = first; cpu <= last && cpu < CPU_SETSIZE; ++cpu) {
      if (CPU_ISSET(cpu, &allowed)) CPU_SET(cpu, &cpus);
    }
    if (next != ',') break;
  }
  std::fclose(file);
  return CPU_COUNT(&cpus) > 0;
}
#endif

// Those allowed whose CPUs the process may use as well: who keeps it on one node wants its memory.
std::vector<int> usable_nodes() {
  std::vector<int> out;
  for (const int node : allowed_nodes()) {
#if defined(__linux__)
    cpu_set_t cpus;
    if (!usable_cpus(node, cpus)) continue;
#endif
    out.push_back(node);
  }
  return out;
}

struct Nodes {
  std::mutex mutex;
  std::vector<int> spread;
  Nodes() {
    auto usable = usable_nodes();
    if (usable.size() > 1) spread = std::move(usable);
  }
};
Nodes& nodes() {
  static Nodes* const instance = new Nodes;  // leaked: buffers may be made while a process exits
  return *instance;
}

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
  set_policy(data, bytes, kInterleave, memory_nodes());
#endif
}

void place([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes, [[maybe_unused]] int node) {
#if defined(__linux__)
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto address = reinterpret_cast<uintptr_t>(data), first = address / page * page;
  set_policy(reinterpret_cast<void*>(first), bytes + (address - first), kPreferred, {node});
#endif
}

void stay_on_node([[maybe_unused]] int node) {
#if defined(__linux__)
  cpu_set_t cpus;
  if (usable_cpus(node, cpus)) sched_setaffinity(0, sizeof(cpus), &cpus);
#endif
}

}  // namespace ktcore
