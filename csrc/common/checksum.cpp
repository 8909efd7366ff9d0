#include "common/checksum.h"

#include <bit>
#include <cstring>
#include <vector>

#include "common/platform.h"
#include "common/thread_pool.h"

namespace ktcore {
namespace {

constexpr size_t kChunk = size_t{1} << 20;
constexpr int kLanes = 8;  // independent, so that multiplications overlap
constexpr uint64_t kMultiplier = 0x9e3779b97f4a7c15;  // odd, so that it loses nothing

// One word more. For a given `sum` no two words, and for a word no two sums, give the same.
uint64_t mix(uint64_t sum, uint64_t word) {
  sum = (sum ^ word) * kMultiplier;
  return sum ^ (sum >> 32);
}

uint64_t chunk_sum(const uint8_t* data, size_t bytes) {
  uint64_t lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<uint64_t>(i + 1) * kMultiplier;
  size_t at = 0;
  for (; at + sizeof(lanes) <= bytes; at += sizeof(lanes)) {
    uint64_t words[kLanes];
    std::memcpy(words, data + at, sizeof(words));
    for (int i = 0; i < kLanes; ++i) lanes[i] = std::rotl((lanes[i] ^ words[i]) * kMultiplier, 29);
  }
  uint64_t sum = bytes;
  for (const uint64_t lane : lanes) sum = mix(sum, lane);
  for (; at < bytes; at += 8) {
    uint64_t word = 0;
    std::memcpy(&word, data + at, bytes - at < 8 ? bytes - at : 8);
    sum = mix(sum, word);
  }
  return sum;
}

}  // namespace

uint64_t checksum(const uint8_t* data, size_t bytes) {
  const auto chunks = static_cast<int64_t>((bytes + kChunk - 1) / kChunk);
  std::vector<uint64_t> sums(static_cast<size_t>(chunks));
  const auto pool = default_pool();
  {
    std::lock_guard<std::mutex> guard(pool->lock());
    parallel_for(*pool, chunks, [&](int64_t i, int) {
      const size_t begin = static_cast<size_t>(i) * kChunk;
      sums[static_cast<size_t>(i)] =
          chunk_sum(data + begin, bytes - begin < kChunk ? bytes - begin : kChunk);
    });
  }
  uint64_t sum = bytes;
  for (const uint64_t s : sums) sum = mix(sum, s);
  return sum;
}

}  // namespace ktcore
