#include "common/buffer.h"

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "common/numa.h"
#include "common/platform.h"

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <sys/mman.h>
#endif

namespace ktcore {

namespace {
constexpr size_t kHugePage = size_t{2} << 20;
#if defined(__SANITIZE_ADDRESS__)
#define KT_SANITIZE_ADDRESS
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define KT_SANITIZE_ADDRESS
#endif
#endif
}  // namespace

Buffer::Buffer(size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
#if defined(_WIN32)
  mapped_ = bytes;
  base_ = VirtualAlloc(nullptr, mapped_, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
  if (base_ == nullptr) throw std::bad_alloc();
  data_ = static_cast<uint8_t*>(base_);
#elif defined(KT_SANITIZE_ADDRESS)
  // From the heap, whose bounds the sanitizer watches; it knows nothing of a mapping's.
  mapped_ = bytes;
  if (posix_memalign(&base_, 4096, bytes) != 0) throw std::bad_alloc();
  std::memset(base_, 0, bytes);
  data_ = static_cast<uint8_t*>(base_);
#else
  const bool large = bytes >= kHugePage;
  mapped_ = large
                ? static_cast<size_t>(round_up(static_cast<int64_t>(bytes), kHugePage)) + kHugePage
                : bytes;
  base_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base_ == MAP_FAILED) {
    base_ = nullptr;
    throw std::bad_alloc();
  }
  data_ = static_cast<uint8_t*>(base_);
  if (large) {
    const auto address = reinterpret_cast<uintptr_t>(base_);
    data_ += round_up(static_cast<int64_t>(address), kHugePage) - static_cast<int64_t>(address);
#if defined(MADV_HUGEPAGE)
    // A hint: fewer page walks on a sequential read. Refusal costs speed, not correctness.
    madvise(data_, mapped_ - kHugePage, MADV_HUGEPAGE);
#endif
    interleave(data_, mapped_ - kHugePage);
  }
#endif
}

Buffer::Buffer(const uint8_t* data, size_t bytes, std::shared_ptr<const void> owner)
    : data_(const_cast<uint8_t*>(data)), size_(bytes), owner_(std::move(owner)) {}

Buffer::~Buffer() {
  if (base_ == nullptr) return;
#if defined(_WIN32)
  VirtualFree(base_, 0, MEM_RELEASE);
#elif defined(KT_SANITIZE_ADDRESS)
  std::free(base_);
#else
  munmap(base_, mapped_);
#endif
}

Buffer::Buffer(Buffer&& other) noexcept { *this = std::move(other); }

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(base_, other.base_);
  std::swap(mapped_, other.mapped_);
  std::swap(owner_, other.owner_);
  return *this;
}

void Buffer::reserve(size_t bytes) {
  if (bytes <= size_) return;
  *this = Buffer();  // give back first: the two need not exist together
  *this = Buffer(bytes);
}

void Buffer::place([[maybe_unused]] size_t begin, [[maybe_unused]] size_t bytes,
                   [[maybe_unused]] int node) const {
#if !defined(_WIN32) && !defined(KT_SANITIZE_ADDRESS)
  // What is small shares its pages' nodes with its neighbours.
  if (base_ != nullptr && size_ >= kHugePage) ktcore::place(data_ + begin, bytes, node);
#endif
}

std::string Buffer::lock() const {
  if (size_ == 0) return {};
#if defined(_WIN32)
  // No process may lock more than its smallest working set, which is small unless it asks.
  SIZE_T least, most;
  const HANDLE process = GetCurrentProcess();
  if (!GetProcessWorkingSetSize(process, &least, &most) ||
      !SetProcessWorkingSetSize(process, least + size_, most + size_) ||
      !VirtualLock(data_, size_)) {
    return "Windows error " + std::to_string(GetLastError());
  }
  return {};
#else
  return mlock(data_, size_) == 0 ? std::string() : std::strerror(errno);
#endif
}

}  // namespace ktcore
