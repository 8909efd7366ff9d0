#include "common/futex.h"

#include "common/platform.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#elif defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#endif

#if defined(_M_X64) || defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ktcore {

void cpu_relax() {
#if defined(_M_X64) || defined(__x86_64__)
  _mm_pause();
#endif
}

#if defined(__linux__)

void futex_wait(std::atomic<uint32_t>& word, uint32_t expected) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, expected, nullptr,
          nullptr, 0);
}
void futex_wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr,
          nullptr, 0);
}

#elif defined(_WIN32)

void futex_wait(std::atomic<uint32_t>& word, uint32_t expected) {
  WaitOnAddress(&word, &expected, sizeof(expected), INFINITE);
}
void futex_wake_all(std::atomic<uint32_t>& word) { WakeByAddressAll(&word); }

#else

void futex_wait(std::atomic<uint32_t>& word, uint32_t expected) { word.wait(expected); }
void futex_wake_all(std::atomic<uint32_t>& word) { word.notify_all(); }

#endif

}  // namespace ktcore
