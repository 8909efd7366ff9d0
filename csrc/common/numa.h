// Memory on machines with several NUMA nodes.
#pragma once

#include <cstddef>
#include <vector>

namespace ktcore {

// The nodes whose memory this process may use; {0} where the system does not say.
std::vector<int> allowed_nodes();

// The nodes over which large buffers are spread from now on; fewer than one: none is spread. At
// first `allowed_nodes` if there are several.
void set_memory_nodes(std::vector<int> nodes);
std::vector<int> memory_nodes();

// Spreads pages that nobody has touched yet over `memory_nodes`, one by one: which thread reads a block
// depends on what is active, so that every thread reads all of a weight, and all nodes' memory together
// is faster than any node's alone. A hint: refusal costs speed, not correctness.
void interleave(void* data, size_t bytes);

}  // namespace ktcore
