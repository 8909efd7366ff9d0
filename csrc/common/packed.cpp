#include "common/packed.h"

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

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
  const int64_t group_bytes = m.layout.group_bytes();
  constexpr int64_t kUnits = kGroup / 8;
  for (int64_t r = 0; r < rows; ++r) {
    const auto* src = static_cast<const uint8_t*>(m.data) + (row0 + r) * groups * (kGroup / 2);
    const auto* scales = static_cast<const uint8_t*>(m.scales) + (row0 + r) * groups * 2;
    for (int64_t g = 0; g < groups; ++g) {
      uint8_t* to = out + g * group_bytes;
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

uint16_t f16_of_float(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude >= 0x38800000) {  // exact: the caller chose a type that holds every scale
    return static_cast<uint16_t>(sign | (magnitude - 0x38000000) >> 13);
  }
  return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::ldexp(std::fabs(v), 24)));
}

void store_scale(float v, DType type, uint8_t* out) {
  if (type == DType::f32) {
    std::memcpy(out, &v, 4);
    return;
  }
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  const uint16_t half = type == DType::f16 ? f16_of_float(v) : static_cast<uint16_t>(bits >> 16);
  std::memcpy(out, &half, 2);
}

// For nibbles: a code whose level is 0, to fill up columns with. Where there is none, the padding's
// weight does not matter, for its activations are 0; but scales must be finite, and are.
uint8_t zero_code(const WeightLayout& layout) {
  for (uint8_t i = 0; i < 16; ++i) {
    if (layout.levels[i] == 0) return i;
  }
  return 0;
}

void pack_codes(const StoredMatrix& m, int64_t row0, int64_t rows, uint8_t* out) {
  const WeightLayout& layout = m.layout;
  const bool nibbles = layout.has_nibbles();
  const int64_t groups = ceil_div(m.cols, kGroup), sets = layout.sets(), set = kGroup / sets;
  const int64_t stored_groups = ceil_div(m.cols, m.group_size);
  const int64_t unit_columns = nibbles ? 8 : 4, units = kGroup / unit_columns;
  const uint8_t padding = nibbles ? zero_code(layout) : 0;
  for (int64_t r = 0; r < rows; ++r) {
    const auto* src = static_cast<const uint8_t*>(m.data) + (row0 + r) * m.cols;
    const auto* scales = static_cast<const float*>(m.scales) + (row0 + r) * stored_groups;
    const float* offsets = layout.offsets ? m.offsets + (row0 + r) * stored_groups : nullptr;
    for (int64_t g = 0; g < groups; ++g) {
      uint8_t* to = out + g * layout.group_bytes();
      for (int64_t unit = 0; unit < units; ++unit, to += kUnitBytes) {
        const int64_t k = g * kGroup + unit * unit_columns;
        uint8_t codes[8];
        for (int64_t i = 0; i < unit_columns; ++i) codes[i] = k + i < m.cols ? src[k + i] : padding;
        if (nibbles) {
          for (int64_t i = 0; i < 4; ++i) {
            codes[i] = static_cast<uint8_t>((codes[i] & 15) | codes[i + 4] << 4);
          }
        }
        std::memcpy(to + r * 4, codes, 4);
      }
      for (int64_t i = 0; i < sets; ++i) {
        const int64_t k = g * kGroup + i * set;
        const int64_t from = (k < m.cols ? k : m.cols - 1) / m.group_size;
        const int64_t size = dtype_size(layout.scale_type);
        store_scale(scales[from], layout.scale_type, to + i * layout.set_bytes() + r * size);
        if (offsets != nullptr) {
          store_scale(offsets[from], layout.scale_type,
                      to + (sets + i) * layout.set_bytes() + r * size);
        }
      }
    }
  }
}

// Packs rows [row0, row0 + 32) into the block at `out`; rows past the end become zeros.
void pack_block(const StoredMatrix& m, int64_t row0, uint8_t* out) {
  const int64_t rows = m.rows - row0 < kBlockRows ? m.rows - row0 : kBlockRows;
  if (rows < kBlockRows) std::memset(out, 0, static_cast<size_t>(m.layout.block_bytes(m.cols)));
  switch (m.layout.format) {
    case WeightFormat::bf16: return pack_bf16(m, row0, rows, out);
    case WeightFormat::int8: return pack_int8(m, row0, rows, out);
    case WeightFormat::int4_g32: return pack_int4(m, row0, rows, out);
    default: return pack_codes(m, row0, rows, out);
  }
}

// Packs all blocks of a matrix on the pool; block b goes to first + b * step.
void pack_blocks(const StoredMatrix& m, uint8_t* first, int64_t step) {
  const auto pool = default_pool();
  std::lock_guard<std::mutex> guard(pool->lock());
  parallel_for(*pool, ceil_div(m.rows, kBlockRows),
               [&](int64_t b, int) { pack_block(m, b * kBlockRows, first + b * step); });
}

size_t matrix_bytes(const WeightLayout& layout, int64_t rows, int64_t cols) {
  return static_cast<size_t>(ceil_div(rows, kBlockRows) * layout.block_bytes(cols));
}

void check_size(const Buffer& buffer, size_t expected) {
  if (buffer.size() != expected || reinterpret_cast<uintptr_t>(buffer.data()) % 64 != 0) {
    throw std::invalid_argument("memory: expected " + std::to_string(expected) +
                                " bytes at a multiple of 64, got " + std::to_string(buffer.size()));
  }
}

void check_writable(const Buffer& buffer) {
  if (buffer.read_only()) throw std::logic_error("pack: these weights are another's, to be read");
}

}  // namespace

PackedMatrix::PackedMatrix(const WeightLayout& l, int64_t r, int64_t c)
    : PackedMatrix(l, r, c, Buffer(matrix_bytes(l, r, c))) {}

PackedMatrix::PackedMatrix(const WeightLayout& l, int64_t r, int64_t c, Buffer memory)
    : layout(l), rows(r), cols(c), buffer(std::move(memory)) {
  check_size(buffer, matrix_bytes(l, r, c));
}

void PackedMatrix::pack(StoredMatrix m) {
  check_writable(buffer);
  m.layout = layout;
  m.rows = rows;
  m.cols = cols;
  pack_blocks(m, buffer.data(), layout.block_bytes(cols));
}

PackedExperts::PackedExperts(const WeightLayout& gate_up, const WeightLayout& down, int64_t e,
                             int64_t h, int64_t i)
    : PackedExperts(gate_up, down, e, h, i,
                    Buffer(static_cast<size_t>(e) *
                           (2 * matrix_bytes(gate_up, i, h) + matrix_bytes(down, h, i)))) {}

PackedExperts::PackedExperts(const WeightLayout& gate_up, const WeightLayout& down, int64_t e,
                             int64_t h, int64_t i, Buffer memory)
    : gate_up_layout(gate_up),
      down_layout(down),
      num_experts(e),
      hidden_size(h),
      intermediate_size(i),
      buffer(std::move(memory)) {
  check_size(buffer, static_cast<size_t>(e * (gate_up_bytes() + down_bytes())));
}

int64_t PackedExperts::gate_up_bytes() const {
  return 2 * ceil_div(intermediate_size, kBlockRows) * gate_up_layout.block_bytes(hidden_size);
}
int64_t PackedExperts::down_bytes() const {
  return ceil_div(hidden_size, kBlockRows) * down_layout.block_bytes(intermediate_size);
}
const uint8_t* PackedExperts::gate_up(int64_t expert) const {
  return buffer.data() + expert * (gate_up_bytes() + down_bytes());
}
const uint8_t* PackedExperts::down(int64_t expert) const {
  return gate_up(expert) + gate_up_bytes();
}

void PackedExperts::pack(int64_t expert, Projection projection, StoredMatrix m) {
  check_writable(buffer);
  if (projection == Projection::down) {
    m.layout = down_layout;
    m.rows = hidden_size;
    m.cols = intermediate_size;
    pack_blocks(m, const_cast<uint8_t*>(down(expert)), down_layout.block_bytes(m.cols));
    return;
  }
  m.layout = gate_up_layout;
  m.rows = intermediate_size;
  m.cols = hidden_size;
  const int64_t block = gate_up_layout.block_bytes(m.cols);
  const int64_t offset = projection == Projection::up ? block : 0;
  pack_blocks(m, const_cast<uint8_t*>(gate_up(expert)) + offset, 2 * block);
}

}  // namespace ktcore
