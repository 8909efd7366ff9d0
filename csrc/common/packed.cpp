#include "common/packed.h"

#include <cstring>

#include "common/thread_pool.h"

namespace ktcore {
namespace {

void pack_bf16(const StoredMatrix& m, int64_t row0, int64_t rows, uint8_t* out) {
  auto* dst = reinterpret_cast<uint16_t*>(out);
  for (int64_t r = 0; r < rows; ++r) {
    const auto* src = static_cast<const uint16_t*>(m.data) + (row0 + r) * m.cols;
    for (int64_t k = 0; k < m.cols; ++k) dst[(k / 2 * kBlockRows + r) * 2 + k % 2] = src[k];
  }
}

void pack_int8(const StoredMatrix& m, int64_t row0, int64_t rows, uint8_t* out) {
  const int64_t padded = round_up(m.cols, kGroup);
  std::memset(out, 0, static_cast<size_t>(padded * kBlockRows));
  auto* scales = reinterpret_cast<float*>(out + padded * kBlockRows);
  for (int64_t r = 0; r < rows; ++r) {
    const auto* src = static_cast<const uint8_t*>(m.data) + (row0 + r) * m.cols;
    int64_t k = 0;
    for (; k + 4 <= m.cols; k += 4) {
      uint32_t four;
      std::memcpy(&four, src + k, 4);
      std::memcpy(out + k * kBlockRows + r * 4, &four, 4);
    }
    for (; k < m.cols; ++k) out[k / 4 * kUnitBytes + r * 4 + k % 4] = src[k];
    scales[r] = static_cast<const float*>(m.scales)[row0 + r];
  }
}

// Nibbles n0 n1 n2 n3 of the low half, each into a byte of its own.
uint32_t spread_nibbles(uint32_t v) {
  v = (v | (v << 8)) & 0x00ff00ffu;
  return (v | (v << 4)) & 0x0f0f0f0fu;
}

void pack_int4(const StoredMatrix& m, int64_t row0, int64_t rows, uint8_t* out) {
  const int64_t groups = ceil_div(m.cols, kGroup);
  constexpr int64_t kBytes = group_bytes(WeightFormat::int4_g32);
  constexpr int64_t kUnits = kGroup / 8;
  for (int64_t r = 0; r < rows; ++r) {
    const auto* src = static_cast<const uint8_t*>(m.data) + (row0 + r) * groups * (kGroup / 2);
    const auto* scales = static_cast<const uint8_t*>(m.scales) + (row0 + r) * groups * 2;
    for (int64_t g = 0; g < groups; ++g) {
      uint8_t* to = out + g * kBytes;
      for (int64_t unit = 0; unit < kUnits; ++unit) {
        uint32_t eight;
        std::memcpy(&eight, src + (g * kUnits + unit) * 4, 4);
        eight = spread_nibbles(eight & 0xffffu) | spread_nibbles(eight >> 16) << 4;
        std::memcpy(to + unit * kUnitBytes + r * 4, &eight, 4);
      }
      std::memcpy(to + kUnits * kUnitBytes + r * 2, scales + g * 2, 2);
    }
  }
}

// Packs rows [row0, row0 + 32) into the block at `out`; rows past the end become zeros.
void pack_block(const StoredMatrix& m, int64_t row0, uint8_t* out) {
  const int64_t rows = m.rows - row0 < kBlockRows ? m.rows - row0 : kBlockRows;
  if (rows < kBlockRows) std::memset(out, 0, static_cast<size_t>(block_bytes(m.format, m.cols)));
  switch (m.format) {
    case WeightFormat::bf16: return pack_bf16(m, row0, rows, out);
    case WeightFormat::int8: return pack_int8(m, row0, rows, out);
    case WeightFormat::int4_g32: return pack_int4(m, row0, rows, out);
  }
}

// Packs all blocks of a matrix on the pool; block b goes to first + b * step.
void pack_blocks(const StoredMatrix& m, uint8_t* first, int64_t step) {
  const auto pool = default_pool();
  std::lock_guard<std::mutex> guard(pool->lock());
  parallel_for(*pool, ceil_div(m.rows, kBlockRows),
               [&](int64_t b, int) { pack_block(m, b * kBlockRows, first + b * step); });
}

}  // namespace

PackedMatrix::PackedMatrix(WeightFormat f, int64_t r, int64_t c)
    : format(f),
      rows(r),
      cols(c),
      buffer(static_cast<size_t>(ceil_div(r, kBlockRows) * block_bytes(f, c))) {}

void PackedMatrix::pack(const void* data, const void* scales) {
  pack_blocks({format, rows, cols, data, scales}, buffer.data(), block_bytes(format, cols));
}

PackedExperts::PackedExperts(WeightFormat f, int64_t e, int64_t h, int64_t i)
    : format(f), num_experts(e), hidden_size(h), intermediate_size(i) {
  buffer = Buffer(static_cast<size_t>(e * (gate_up_bytes() + down_bytes())));
}

int64_t PackedExperts::gate_up_bytes() const {
  return 2 * ceil_div(intermediate_size, kBlockRows) * block_bytes(format, hidden_size);
}
int64_t PackedExperts::down_bytes() const {
  return ceil_div(hidden_size, kBlockRows) * block_bytes(format, intermediate_size);
}
const uint8_t* PackedExperts::gate_up(int64_t expert) const {
  return buffer.data() + expert * (gate_up_bytes() + down_bytes());
}
const uint8_t* PackedExperts::down(int64_t expert) const {
  return gate_up(expert) + gate_up_bytes();
}

void PackedExperts::pack(int64_t expert, Projection projection, const void* data,
                         const void* scales) {
  if (projection == Projection::down) {
    pack_blocks({format, hidden_size, intermediate_size, data, scales},
                const_cast<uint8_t*>(down(expert)), block_bytes(format, intermediate_size));
    return;
  }
  const int64_t block = block_bytes(format, hidden_size);
  const int64_t offset = projection == Projection::up ? block : 0;
  pack_blocks({format, intermediate_size, hidden_size, data, scales},
              const_cast<uint8_t*>(gate_up(expert)) + offset, 2 * block);
}

}  // namespace ktcore
