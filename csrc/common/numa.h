// Memory on machines with several NUMA nodes.
#pragma once

#include <cstddef>
#include <vector>

namespace ktcore {

// The nodes whose memory this process may use; {0} where the system does not say.
std::vector<int> allowed_nodes();

// The nodes over which large buffers are spread from now on and, if there are several, weights cut and
// threads shared out; none: all is left to the system. A number below zero is a node that is only pretended, to see that results are the
// same. At first those allowed whose CPUs this process may use, if there are several.
void set_memory_nodes(std::vector<int> nodes);
std::vector<int> memory_nodes();

// Spreads pages that nobody has touched yet over `memory_nodes`, one by one, or keeps them on one node. A
// hint: refusal costs speed, not correctness.
void interleave(void* data, size_t bytes);
void place(void* data, size_t bytes, int node);

// Keeps the calling thread on the CPUs of a node, of those that it may use.
void stay_on_node(int node);

}  // namespace ktcore
