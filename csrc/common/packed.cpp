#include "common/packed.h"

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/numa.h"
#include "common/thread_pool.h"

namespace ktcore {
namespace {

void pack_bf16(const StoredMatrix& m, int64_t row0, int64_t rows, uint8_t* out) {
  auto* dst = reinterpret_cast<uint16_t*>(out);
  auto* scales = reinterpret_cast<float*>(out + round_up(m.cols, kGroup) * kBlockRows * 2);
  for (int64_t r = 0; r < rows; ++r) {
    const auto* src = static_cast<const uint16_t*>(m.data) + (row0 + r) * m.cols;
    uint32_t most = 0;  // without its sign
    for (int64_t k = 0; k < m.cols; ++k) {
      dst[(k / 2 * kBlockRows + r) * 2 + k % 2] = src[k];
      const uint32_t magnitude = src[k] & 0x7fff;
      if (magnitude > most) most = magnitude;
    }
    most <<= 16;
    float largest;
    std::memcpy(&largest, &most, 4);
    scales[r] = !(largest <= 3.4e38f) ? std::nanf("")
                : largest < 1e-30f    ? 0.0f
                                      : largest / kLargestBf16;
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

void store_scale(float v, ScaleType type, uint8_t* out) {
  if (type == ScaleType::f32) {
    std::memcpy(out, &v, 4);
    return;
  }
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  if (type == ScaleType::e8m0) {
    *out = static_cast<uint8_t>(bits >> 23);
    return;
  }
  const uint16_t half =
      type == ScaleType::f16 ? f16_of_float(v) : static_cast<uint16_t>(bits >> 16);
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
  const int64_t groups = ceil_div(m.cols, kGroup), size = scale_bytes(layout.scale_type);
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
  if (layout.row_scales) {
    std::memcpy(out + layout.row_scales_at(groups), m.row_scales + row0,
                static_cast<size_t>(rows) * sizeof(float));
  }
  for (int64_t g = 0; g < groups; ++g) {
    uint8_t* to = out + layout.inner_at(g);
    if (layout.inner_nibbles) {
      for (int64_t set = 0; set < layout.sets(); ++set, to += kBlockRows) {
        const int64_t column = g * kGroup + set * (kGroup / layout.sets());
        for (int64_t r = 0; r < rows; ++r) {
          const int scale = value_at(m.inner_scales, m, row0 + r, column, m.group_size);
          const int offset = value_at(m.inner_offsets, m, row0 + r, column, m.group_size);
          to[r] = static_cast<uint8_t>((scale & 15) | (offset & 15) << 4);
        }
      }
      continue;
    }
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

// Whether a group's codes have each of their bits in one place, and units no others, as there are as many of these.
constexpr bool is_complete(int bits) {
  bool used[8][8] = {};
  for (int quad = 0; quad < kGroup / 4; ++quad) {
    bool found[8] = {};
    const QuadParts parts = quad_parts(bits, quad);
    for (int i = 0; i < parts.count; ++i) {
      const CodePart& part = parts.part[i];
      for (int bit = 0; bit < part.bits; ++bit) {
        if (part.unit >= bits || used[part.unit][part.at + bit] || found[part.to + bit])
          return false;
        used[part.unit][part.at + bit] = found[part.to + bit] = true;
      }
    }
    for (int bit = 0; bit < bits; ++bit) {
      if (!found[bit]) return false;
    }
  }
  return true;
}
static_assert(is_complete(2) && is_complete(3) && is_complete(4) && is_complete(5) &&
              is_complete(6) && is_complete(8));

// 32 codes of kBits bits into a row's lanes of the units at `to`.
template <int kBits>
void pack_quads(const uint8_t* codes, uint8_t* to) {
  uint32_t lanes[kBits] = {};
  KT_UNROLL
  for (int quad = 0; quad < kGroup / 4; ++quad) {
    uint32_t four;
    std::memcpy(&four, codes + 4 * quad, 4);
    const QuadParts parts = quad_parts(kBits, quad);
    for (int i = 0; i < parts.count; ++i) {
      const CodePart& part = parts.part[i];
      lanes[part.unit] |= ((four >> part.to) & 0x01010101u * ((1u << part.bits) - 1)) << part.at;
    }
  }
  for (int unit = 0; unit < kBits; ++unit) std::memcpy(to + unit * kUnitBytes, lanes + unit, 4);
}
void pack_quads(int64_t bits, const uint8_t* codes, uint8_t* to) {
  switch (bits) {
    case 2: return pack_quads<2>(codes, to);
    case 3: return pack_quads<3>(codes, to);
    case 4: return pack_quads<4>(codes, to);
    case 5: return pack_quads<5>(codes, to);
    case 6: return pack_quads<6>(codes, to);
    default: return pack_quads<8>(codes, to);
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
      pack_quads(m.layout.code_bits(), codes, group + r * 4);
    }
  }
  pack_scales(m, row0, rows, out);
}

void pack_f8(const StoredMatrix& m, int64_t row0, int64_t rows, uint8_t* out) {
  const int64_t groups = ceil_div(m.cols, kGroup);
  pack_scales(m, row0, rows, out);
  const int64_t size = scale_bytes(m.layout.scale_type);
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
        const uint8_t* from = codes + unit * 4;
        const uint8_t lane[4] = {from[0], from[2], from[1], from[3]};
        std::memcpy(group + unit * kUnitBytes + r * 4, lane, 4);
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

// Packs all blocks of a matrix on the pool; block b goes to place(b).
template <class Place>
void pack_blocks(const StoredMatrix& m, Place&& place) {
  const auto pool = default_pool();
  std::lock_guard<std::mutex> guard(pool->lock());
  parallel_for(*pool, ceil_div(m.rows, kBlockRows),
               [&](int64_t b, int) { pack_block(m, b * kBlockRows, place(b)); });
}

// Into memory that was taken to be written.
uint8_t* writable(const uint8_t* p) { return const_cast<uint8_t*>(p); }

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
    : layout(l), rows(r), cols(c), buffer(matrix_bytes(l, r, c) + columns_bytes(l, c)) {
  const std::vector<int> nodes = memory_nodes();
  const auto count = static_cast<int64_t>(nodes.size());
  const int64_t blocks = ceil_div(r, kBlockRows), block = l.block_bytes(c);
  for (int64_t n = 0; count > 1 && n < count; ++n) {
    const int64_t first = blocks * n / count, end = blocks * (n + 1) / count;
    buffer.place(static_cast<size_t>(first * block), static_cast<size_t>((end - first) * block),
                 nodes[static_cast<size_t>(n)]);
  }
}

PackedMatrix::PackedMatrix(const WeightLayout& l, int64_t r, int64_t c, Buffer memory)
    : layout(l), rows(r), cols(c), buffer(std::move(memory)) {
  check_size(buffer, matrix_bytes(l, r, c) + columns_bytes(l, c));
  check_columns(columns(), cols, cols);
  if (memory_nodes().size() < 2) return;
  PackedMatrix placed(l, r, c);
  std::memcpy(placed.buffer.data(), buffer.data(), buffer.size());
  buffer = std::move(placed.buffer);
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
  pack_blocks(m, [&](int64_t b) { return buffer.data() + b * layout.block_bytes(cols); });
}

namespace {

size_t experts_bytes(const WeightLayout& gate_up, const WeightLayout& down, int64_t e, int64_t h,
                     int64_t i) {
  return static_cast<size_t>(e) * (2 * (matrix_bytes(gate_up, i, h) + columns_bytes(gate_up, h)) +
                                   matrix_bytes(down, h, i) + columns_bytes(down, i));
}

}  // namespace

PackedExperts::PackedExperts(const WeightLayout& gate_up, const WeightLayout& down, int64_t e,
                             int64_t h, int64_t i)
    : PackedExperts(gate_up, down, e, h, i, Buffer(experts_bytes(gate_up, down, e, h, i)),
                    memory_nodes()) {}

PackedExperts::PackedExperts(const WeightLayout& gate_up, const WeightLayout& down, int64_t e,
                             int64_t h, int64_t i, Buffer memory)
    : PackedExperts(gate_up, down, e, h, i, std::move(memory), {}) {
  if (memory_nodes().size() < 2) return;
  PackedExperts cut(gate_up, down, e, h, i);
  cut.copy_from(*this);
  *this = std::move(cut);
}

PackedExperts::PackedExperts(const WeightLayout& gate_up, const WeightLayout& down, int64_t e,
                             int64_t h, int64_t i, Buffer memory, const std::vector<int>& nodes)
    : gate_up_layout(gate_up),
      down_layout(down),
      num_experts(e),
      hidden_size(h),
      intermediate_size(i),
      buffer(std::move(memory)) {
  check_size(buffer, experts_bytes(gate_up, down, e, h, i));
  check_columns(columns(0, Projection::gate), 2 * e * h, h);
  check_columns(columns(0, Projection::down), e * i, i);
  const int64_t count = nodes.empty() ? 1 : static_cast<int64_t>(nodes.size());
  const int64_t up_blocks = ceil_div(i, kBlockRows), down_blocks = ceil_div(h, kBlockRows);
  const uint8_t* at = buffer.data();
  for (int64_t n = 0; n < count; ++n) {
    BlockRun of_up{up_blocks * n / count, up_blocks * (n + 1) / count, at, 0};
    BlockRun of_down{down_blocks * n / count, down_blocks * (n + 1) / count, at, 0};
    const int64_t up_bytes = (of_up.end - of_up.first) * gate_up_block();
    of_down.data += up_bytes;
    of_up.stride = of_down.stride = up_bytes + (of_down.end - of_down.first) * down_block();
    gate_up_runs_.push_back(of_up);
    down_runs_.push_back(of_down);
    if (count > 1) {
      buffer.place(static_cast<size_t>(at - buffer.data()), static_cast<size_t>(e * of_up.stride),
                   nodes[static_cast<size_t>(n)]);
    }
    at += e * of_up.stride;
  }
}

void PackedExperts::copy_from(const PackedExperts& other) {
  const auto copy = [](const std::vector<BlockRun>& from, const std::vector<BlockRun>& to,
                       int64_t expert, int64_t bytes) {
    for (int64_t b = 0; b < to.back().end; ++b) {
      std::memcpy(writable(run_of(to.data(), b).block(expert, b, bytes)),
                  run_of(from.data(), b).block(expert, b, bytes), static_cast<size_t>(bytes));
    }
  };
  const auto pool = default_pool();
  std::lock_guard<std::mutex> guard(pool->lock());
  parallel_for(*pool, num_experts, [&](int64_t expert, int) {
    copy(other.gate_up_runs_, gate_up_runs_, expert, gate_up_block());
    copy(other.down_runs_, down_runs_, expert, down_block());
  });
  const auto before =
      static_cast<size_t>(reinterpret_cast<uint8_t*>(all_columns()) - buffer.data());
  std::memcpy(all_columns(), other.all_columns(), buffer.size() - before);
}

PackedExperts PackedExperts::in_one_piece() const {
  PackedExperts out(gate_up_layout, down_layout, num_experts, hidden_size, intermediate_size,
                    Buffer(buffer.size()), {});
  out.copy_from(*this);
  return out;
}

int32_t* PackedExperts::all_columns() const {
  const size_t blocks = matrix_bytes(down_layout, hidden_size, intermediate_size) +
                        2 * matrix_bytes(gate_up_layout, intermediate_size, hidden_size);
  return reinterpret_cast<int32_t*>(buffer.data() + static_cast<size_t>(num_experts) * blocks);
}

const int32_t* PackedExperts::columns(int64_t expert, Projection projection) const {
  const int32_t* gates_and_ups = all_columns();
  if (projection != Projection::down) {
    const int64_t row = 2 * expert + (projection == Projection::up ? 1 : 0);
    return gate_up_layout.reordered ? gates_and_ups + row * hidden_size : nullptr;
  }
  if (!down_layout.reordered) return nullptr;
  const int64_t before = gate_up_layout.reordered ? 2 * num_experts * hidden_size : 0;
  return gates_and_ups + before + expert * intermediate_size;
}

void PackedExperts::pack(int64_t expert, Projection projection, StoredMatrix m) {
  check_writable(buffer);
  if (projection == Projection::down) {
    m.layout = down_layout;
    m.rows = hidden_size;
    m.cols = intermediate_size;
    if (m.layout.reordered) store_columns(m, columns(expert, projection));
    pack_blocks(m, [&](int64_t b) {
      return writable(run_of(down_runs_.data(), b).block(expert, b, down_block()));
    });
    return;
  }
  m.layout = gate_up_layout;
  m.rows = intermediate_size;
  m.cols = hidden_size;
  if (m.layout.reordered) store_columns(m, columns(expert, projection));
  const int64_t offset = projection == Projection::up ? gate_up_block() / 2 : 0;
  pack_blocks(m, [&](int64_t b) {
    return writable(run_of(gate_up_runs_.data(), b).block(expert, b, gate_up_block())) + offset;
  });
}

}  // namespace ktcore
