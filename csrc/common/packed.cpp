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
  auto* scales = reinterpret_cast<float*>(out + round_up(m.cols, kGroup) * kBlockRows);
  for (int64_t r = 0; r < rows; ++r) {
    const auto* src = static_cast<const uint8_t*>(m.data) + (row0 + r) * m.cols;
    int64_t k = 0;
    for (; k + 4 <= m.cols; k += 4) {
      uint32_t four;
      std::memcpy(&four, src + k, 4);
      std::memcpy(out + k * kBlockRows + r * 4, &four, 4);
    }
    for (; k < m.cols; ++k) out[k / 4 * kUnitBytes + r * 4 + k % 4] = src[k];
    scales[r] = m.scales[row0 + r];
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

// What `values` [row][ceil(cols / size)] has for a column; the last one beyond the end.
template <class T>
T value_at(const T* values, const StoredMatrix& m, int64_t row, int64_t column, int64_t size) {
  column = column < m.cols ? column : m.cols - 1;
  return values[row * ceil_div(m.cols, size) + column / size];
}

// All scales and offsets of a block.
void pack_scales(const StoredMatrix& m, int64_t row0, int64_t rows, uint8_t* out) {
  const WeightLayout& layout = m.layout;
  const int64_t groups = ceil_div(m.cols, kGroup), size = dtype_size(layout.scale_type);
  const int64_t outer_sets = layout.outer_sets();
  for (int64_t piece = 0; piece < ceil_div(groups, layout.span); ++piece) {
    uint8_t* to = out + layout.outer_at(piece * layout.span);
    for (int64_t set = 0; set < outer_sets; ++set, to += layout.set_bytes()) {
      const int64_t column = piece * layout.span * kGroup + set * (kGroup / outer_sets);
      for (int64_t r = 0; r < rows; ++r) {
        const auto store = [&](const float* values, uint8_t* set_at) {
          const float v = value_at(values, m, row0 + r, column, m.scale_size);
          store_scale(v, layout.scale_type, set_at + r * size);
        };
        store(m.scales, to);
        if (layout.offsets) store(m.offsets, to + outer_sets * layout.set_bytes());
      }
    }
  }
  for (int64_t g = 0; g < groups; ++g) {
    uint8_t* to = out + layout.group_at(g) + layout.value_bytes();
    for (const int8_t* values : {layout.inner_scales ? m.inner_scales : nullptr,
                                 layout.inner_offsets ? m.inner_offsets : nullptr}) {
      if (values == nullptr) continue;
      for (int64_t set = 0; set < layout.sets(); ++set, to += kBlockRows) {
        const int64_t column = g * kGroup + set * (kGroup / layout.sets());
        for (int64_t r = 0; r < rows; ++r) {
          to[r] = static_cast<uint8_t>(value_at(values, m, row0 + r, column, m.group_size));
        }
      }
    }
  }
}

// Bits [shift, shift + count) of 32 codes, into `count` units' lanes at `to`: the codes of columns
// 4 i + j go to byte j of the lanes, 8 / count of them, from the lowest bits on.
void pack_bits(const uint8_t* codes, int shift, int count, uint8_t* to) {
  const uint32_t mask = 0x01010101u * ((1u << count) - 1);
  const int per_byte = 8 / count;
  for (int unit = 0; unit < count; ++unit, to += kUnitBytes) {
    uint32_t lane = 0;
    for (int i = 0; i < per_byte; ++i, codes += 4) {
      uint32_t quad;
      std::memcpy(&quad, codes, 4);
      lane |= ((quad >> shift) & mask) << (i * count);
    }
    std::memcpy(to, &lane, 4);
  }
}

// 32 codes of a row from a column on, out of the file's blocks.
void unpack_block(const StoredMatrix& m, int64_t row, int64_t column, uint8_t* codes) {
  const auto* block = static_cast<const uint8_t*>(m.data) +
                      (row * (m.cols / m.block_size) + column / m.block_size) * m.type_size;
  column %= m.block_size;
  std::memset(codes, 0, kGroup);
  for (const CodeField& f : m.fields) {
    const int64_t of_run = f.run * 8 / f.bits;  // codes
    const auto mask = static_cast<uint8_t>((1 << f.bits) - 1);
    if (f.run == 1 && f.bits == 4) {  // the same as below, for two neighbours a byte
      const uint8_t* from = block + f.at + column / 2;
      for (int64_t i = 0; i < kGroup / 2; ++i) {
        codes[2 * i] |= static_cast<uint8_t>((from[i] & 15) << f.shift);
        codes[2 * i + 1] |= static_cast<uint8_t>((from[i] >> 4) << f.shift);
      }
      continue;
    }
    const int64_t step = f.run < kGroup ? f.run : kGroup;
    for (int64_t i = 0; i < kGroup; i += step) {
      const int64_t place = (column + i) % of_run;
      const uint8_t* from = block + f.at + (column + i) / of_run * f.run + place % f.run;
      const int down = static_cast<int>(place / f.run) * f.bits;
      for (int64_t j = 0; j < step; ++j) {
        codes[i + j] |= static_cast<uint8_t>(((from[j] >> down) & mask) << f.shift);
      }
    }
  }
}

void pack_codes(const StoredMatrix& m, int64_t row0, int64_t rows, uint8_t* out) {
  const int bits = static_cast<int>(m.layout.code_bits());
  const int low = bits == 8 ? 8 : bits >= 4 ? 4 : 2;
  // Group by group, so that what is written stays in the first-level cache.
  for (int64_t k = 0; k < m.cols; k += kGroup) {
    uint8_t* group = out + m.layout.group_at(k / kGroup);
    for (int64_t r = 0; r < rows; ++r) {
      // What pads the columns does not matter: their activations are 0.
      uint8_t codes[kGroup] = {};
      if (m.fields.empty()) {
        const auto* src = static_cast<const uint8_t*>(m.data) + (row0 + r) * m.cols + k;
        const int64_t left = m.cols - k;
        std::memcpy(codes, src, static_cast<size_t>(left < kGroup ? left : kGroup));
      } else {
        unpack_block(m, row0 + r, k, codes);
      }
      pack_bits(codes, 0, low, group + r * 4);
      if (bits > low) pack_bits(codes, low, bits - low, group + low * kUnitBytes + r * 4);
    }
  }
  pack_scales(m, row0, rows, out);
}

void pack_f8(const StoredMatrix& m, int64_t row0, int64_t rows, uint8_t* out) {
  const int64_t groups = ceil_div(m.cols, kGroup);
  pack_scales(m, row0, rows, out);
  const int64_t size = dtype_size(m.layout.scale_type);
  for (int64_t r = 0; r < rows; ++r) {
    const auto* src = static_cast<const uint8_t*>(m.data) + (row0 + r) * m.cols;
    for (int64_t g = 0; g < groups; ++g) {
      uint8_t codes[kGroup] = {};
      const int64_t left = m.cols - g * kGroup;
      std::memcpy(codes, src + g * kGroup, static_cast<size_t>(left < kGroup ? left : kGroup));
      uint8_t* group = out + m.layout.group_at(g);
      bool nan = false;
      for (int64_t i = 0; i < kGroup; ++i) nan |= (codes[i] & 0x7f) == 0x7f;
      for (int64_t unit = 0; unit < kGroup / 4; ++unit) {
        std::memcpy(group + unit * kUnitBytes + r * 4, codes + unit * 4, 4);
      }
      if (!nan) continue;
      // The kernels know no NaN codes: a NaN scale has the same effect on the sum.
      uint8_t* scales = out + m.layout.outer_at(g);
      store_scale(std::nanf(""), m.layout.scale_type, scales + r * size);
    }
  }
}

template <class T>
void pack_columns(const StoredMatrix& m, int64_t row0, int64_t rows, uint8_t* out) {
  auto* to = reinterpret_cast<T*>(out);
  for (int64_t r = 0; r < rows; ++r) {
    const auto* src = static_cast<const T*>(m.data) + (row0 + r) * m.cols;
    for (int64_t k = 0; k < m.cols; ++k) to[k * kBlockRows + r] = src[k];
  }
}

// Packs rows [row0, row0 + 32) into the block at `out`; rows past the end become zeros.
void pack_block(const StoredMatrix& m, int64_t row0, uint8_t* out) {
  const int64_t rows = m.rows - row0 < kBlockRows ? m.rows - row0 : kBlockRows;
  if (rows < kBlockRows || m.cols % kGroup != 0) {
    std::memset(out, 0, static_cast<size_t>(m.layout.block_bytes(m.cols)));
  }
  switch (m.layout.format) {
    case WeightFormat::bf16: return pack_bf16(m, row0, rows, out);
    case WeightFormat::f16: return pack_columns<uint16_t>(m, row0, rows, out);
    case WeightFormat::f32: return pack_columns<uint32_t>(m, row0, rows, out);
    case WeightFormat::f8: return pack_f8(m, row0, rows, out);
    case WeightFormat::int8: return pack_int8(m, row0, rows, out);
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

namespace {

size_t columns_bytes(const WeightLayout& layout, int64_t cols) {
  return layout.reordered ? static_cast<size_t>(cols) * sizeof(int32_t) : 0;
}

void store_columns(const StoredMatrix& m, const int32_t* to) {
  for (int64_t i = 0; i < m.cols; ++i) {
    if (m.columns[i] < 0 || m.columns[i] >= m.cols) {
      throw std::invalid_argument("columns: " + std::to_string(m.columns[i]) +
                                  " is none of a matrix of " + std::to_string(m.cols));
    }
    const_cast<int32_t*>(to)[i] = static_cast<int32_t>(m.columns[i]);
  }
}

// For memory that was packed elsewhere: kernels trust these.
void check_columns(const int32_t* columns, int64_t count, int64_t cols) {
  for (int64_t i = 0; columns != nullptr && i < count; ++i) {
    if (columns[i] < 0 || columns[i] >= cols) {
      throw std::invalid_argument("memory: its order of columns is damaged");
    }
  }
}

}  // namespace

PackedMatrix::PackedMatrix(const WeightLayout& l, int64_t r, int64_t c)
    : PackedMatrix(l, r, c, Buffer(matrix_bytes(l, r, c) + columns_bytes(l, c))) {}

PackedMatrix::PackedMatrix(const WeightLayout& l, int64_t r, int64_t c, Buffer memory)
    : layout(l), rows(r), cols(c), buffer(std::move(memory)) {
  check_size(buffer, matrix_bytes(l, r, c) + columns_bytes(l, c));
  check_columns(columns(), cols, cols);
}

const int32_t* PackedMatrix::columns() const {
  if (!layout.reordered) return nullptr;
  return reinterpret_cast<const int32_t*>(buffer.data() + matrix_bytes(layout, rows, cols));
}

void PackedMatrix::pack(StoredMatrix m) {
  check_writable(buffer);
  m.layout = layout;
  m.rows = rows;
  m.cols = cols;
  if (layout.reordered) store_columns(m, columns());
  pack_blocks(m, buffer.data(), layout.block_bytes(cols));
}

PackedExperts::PackedExperts(const WeightLayout& gate_up, const WeightLayout& down, int64_t e,
                             int64_t h, int64_t i)
    : PackedExperts(gate_up, down, e, h, i,
                    Buffer(static_cast<size_t>(e) *
                           (2 * (matrix_bytes(gate_up, i, h) + columns_bytes(gate_up, h)) +
                            matrix_bytes(down, h, i) + columns_bytes(down, i)))) {}

PackedExperts::PackedExperts(const WeightLayout& gate_up, const WeightLayout& down, int64_t e,
                             int64_t h, int64_t i, Buffer memory)
    : gate_up_layout(gate_up),
      down_layout(down),
      num_experts(e),
      hidden_size(h),
      intermediate_size(i),
      buffer(std::move(memory)) {
  check_size(buffer,
             static_cast<size_t>(e * (gate_up_bytes() + down_bytes())) +
                 static_cast<size_t>(e) * (2 * columns_bytes(gate_up, h) + columns_bytes(down, i)));
  check_columns(columns(0, Projection::gate), 2 * e * h, h);
  check_columns(columns(0, Projection::down), e * i, i);
}

const int32_t* PackedExperts::columns(int64_t expert, Projection projection) const {
  const auto* gates_and_ups = reinterpret_cast<const int32_t*>(gate_up(num_experts));
  if (projection != Projection::down) {
    const int64_t row = 2 * expert + (projection == Projection::up ? 1 : 0);
    return gate_up_layout.reordered ? gates_and_ups + row * hidden_size : nullptr;
  }
  if (!down_layout.reordered) return nullptr;
  const int64_t before = gate_up_layout.reordered ? 2 * num_experts * hidden_size : 0;
  return gates_and_ups + before + expert * intermediate_size;
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
    if (m.layout.reordered) store_columns(m, columns(expert, projection));
    pack_blocks(m, const_cast<uint8_t*>(down(expert)), down_layout.block_bytes(m.cols));
    return;
  }
  m.layout = gate_up_layout;
  m.rows = intermediate_size;
  m.cols = hidden_size;
  if (m.layout.reordered) store_columns(m, columns(expert, projection));
  const int64_t block = gate_up_layout.block_bytes(m.cols);
  const int64_t offset = projection == Projection::up ? block : 0;
  pack_blocks(m, const_cast<uint8_t*>(gate_up(expert)) + offset, 2 * block);
}

}  // namespace ktcore
