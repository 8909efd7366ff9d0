// Sleep until a 32-bit word changes: futex on Linux, WaitOnAddress on Windows, C++20 atomic wait
// elsewhere. Spurious wake-ups are allowed, so callers re-check their condition.
#pragma once

#include <atomic>
#include <cstdint>

namespace ktcore {

void futex_wait(std::atomic<uint32_t>& word, uint32_t expected);
void futex_wake_all(std::atomic<uint32_t>& word);

}  // namespace ktcore
