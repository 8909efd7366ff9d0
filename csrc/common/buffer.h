// Page-aligned memory that asks the operating system for large pages, first touched by its user.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ktcore {

class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes);  // zero-filled; throws std::bad_alloc
  ~Buffer();
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }
  // Grows to at least `bytes`; what was inside is not kept.
  void reserve(size_t bytes);

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
  void* base_ = nullptr;  // what to give back, and how much of it
  size_t mapped_ = 0;
};

}  // namespace ktcore
