// Page-aligned memory that asks the operating system for large pages, first touched by its user; or
// somebody else's memory, to be read only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace ktcore {

class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes);  // zero-filled; throws std::bad_alloc
  // What `owner` keeps alive, for as long as this lives.
  Buffer(const uint8_t* data, size_t bytes, std::shared_ptr<const void> owner);
  ~Buffer();
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }
  bool read_only() const { return owner_ != nullptr; }
  // Grows to at least `bytes`; what was inside is not kept.
  void reserve(size_t bytes);
  // Asks that these bytes, of memory of its own that nobody has touched, be a NUMA node's.
  void place(size_t begin, size_t bytes, int node) const;
  // Has the operating system keep it in memory. Empty, or why it refuses.
  std::string lock() const;

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
  void* base_ = nullptr;  // what to give back, and how much of it
  size_t mapped_ = 0;
  std::shared_ptr<const void> owner_;
};

}  // namespace ktcore
