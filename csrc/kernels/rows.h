// Moving 32 values at a time between rows of any float type and registers.
#pragma once

namespace ktcore::KTCORE_ISA {

template <class S>
struct Rows32 {
  static constexpr int kVectors = static_cast<int>(kGroup) / S::kLanes;
  using F = typename S::F;

  // Reads `count` (1 to 32) values at `column`; the rest become zero.
  static KT_INLINE void load(const ConstRows& m, int64_t row, int64_t column, int64_t count, F* v) {
    const int64_t at = row * m.stride + column;
    if (m.dtype == DType::f32) {
      const float* p = static_cast<const float*>(m.data) + at;
      float tail[kGroup];
      if (count < kGroup) p = padded(p, count, tail);
      for (int i = 0; i < kVectors; ++i) v[i] = S::load(p + i * S::kLanes);
      return;
    }
    const uint16_t* p = static_cast<const uint16_t*>(m.data) + at;
    uint16_t tail[kGroup];
    if (count < kGroup) p = padded(p, count, tail);
    if (m.dtype == DType::bf16) {
      for (int i = 0; i < kVectors; ++i) v[i] = S::load_bf16(p + i * S::kLanes);
    } else {
      for (int i = 0; i < kVectors; ++i) v[i] = S::load_f16(p + i * S::kLanes);
    }
  }

  // The same of columns in any order: [column, column + count) of those listed.
  static KT_INLINE void load_listed(const ConstRows& m, int64_t row, const int32_t* columns,
                                    int64_t count, F* v) {
    if (m.dtype == DType::f32) {
      gather<float>(m, row, columns, count, v);
    } else {
      gather<uint16_t>(m, row, columns, count, v);
    }
  }

  // Writes the first `count` (1 to 32) of 32 values.
  static KT_INLINE void store(const Rows& m, int64_t row, int64_t column, int64_t count,
                              const F* v) {
    const int64_t at = row * m.stride + column;
    if (m.dtype == DType::f32) {
      float* p = static_cast<float*>(m.data) + at;
      float tail[kGroup];
      float* to = count < kGroup ? tail : p;
      for (int i = 0; i < kVectors; ++i) S::store(to + i * S::kLanes, v[i]);
      if (to != p) std::memcpy(p, tail, static_cast<size_t>(count) * 4);
      return;
    }
    uint16_t* p = static_cast<uint16_t*>(m.data) + at;
    uint16_t tail[kGroup];
    uint16_t* to = count < kGroup ? tail : p;
    if (m.dtype == DType::bf16) {
      for (int i = 0; i < kVectors; ++i) S::store_bf16(to + i * S::kLanes, v[i]);
    } else {
      for (int i = 0; i < kVectors; ++i) S::store_f16(to + i * S::kLanes, v[i]);
    }
    if (to != p) std::memcpy(p, tail, static_cast<size_t>(count) * 2);
  }

 private:
  template <class T>
  static KT_INLINE void gather(const ConstRows& m, int64_t row, const int32_t* columns,
                               int64_t count, F* v) {
    const T* from = static_cast<const T*>(m.data) + row * m.stride;
    T values[kGroup];
    for (int64_t i = 0; i < count; ++i) values[i] = from[columns[i]];
    load({values, kGroup, m.dtype}, 0, 0, count, v);
  }

  template <class T>
  static KT_INLINE const T* padded(const T* p, int64_t count, T* tail) {
    std::memset(tail, 0, kGroup * sizeof(T));
    std::memcpy(tail, p, static_cast<size_t>(count) * sizeof(T));
    return tail;
  }
};

}  // namespace ktcore::KTCORE_ISA
