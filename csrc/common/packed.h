// Expert and linear weights in the order in which the kernels read them.
//
// A matrix [rows, cols] is cut into blocks of 32 rows; a block is one contiguous run of memory that
// a matrix-vector product reads once, front to back. In a block, each 128-byte unit holds the same
// few columns of all 32 rows, one 32-bit lane a row, which is what the dot-product instructions
// take (pairs of 16 bits a lane, once bytes and nibbles are widened), so no lane is ever shuffled:
//
//   bf16      unit = 2 columns
//   int8      unit = 4 columns; at the end 32 float scales
//   int4_g32  unit = 8 columns: the low nibbles are columns 0-3, the high nibbles columns 4-7, both
//             unsigned (value + 8); after each group of 32 columns its 32 bf16 scales
//   nibbles   as int4_g32, but the nibbles number 16 levels, which the layout lists; after each group
//             its 32 scales, and 32 offsets where the layout has them, in the layout's type:
//             weight = scale * level + offset
//   bytes     as nibbles, with the levels themselves in units of 4 columns
//   nibbles_g16, bytes_g16: two sets of scales, and of offsets, after each group, for 16 columns each
//
// All stored weight formats that are small integers (see Codes in ktcore/formats/base.py) become one
// of these.
//
// 32 outputs of one matrix are one activation group of the next. Rows are padded to whole blocks
// and columns to whole groups with zero weights.
#pragma once

#include "common/buffer.h"
#include "common/platform.h"
#include "common/types.h"

namespace ktcore {

static constexpr int64_t kBlockRows = 32;
static constexpr int64_t kUnitBytes = kBlockRows * 4;

// What a matrix's blocks look like.
struct WeightLayout {
  WeightFormat format = WeightFormat::bf16;
  // For nibbles and bytes alone:
  DType scale_type = DType::f32;
  bool offsets = false;
  int8_t levels[16] = {};

  bool operator==(const WeightLayout&) const = default;
  bool coded() const { return format >= WeightFormat::nibbles; }
  bool has_nibbles() const {
    return format == WeightFormat::nibbles || format == WeightFormat::nibbles_g16;
  }
  // Sets of scales a group.
  int64_t sets() const {
    return format == WeightFormat::nibbles_g16 || format == WeightFormat::bytes_g16 ? 2 : 1;
  }
  // Bytes of one set of scales, or of offsets.
  int64_t set_bytes() const { return kBlockRows * dtype_size(scale_type); }
  // Bytes of one group of 32 columns of a block.
  int64_t group_bytes() const {
    switch (format) {
      case WeightFormat::bf16: return kGroup / 2 * kUnitBytes;
      case WeightFormat::int8: return kGroup / 4 * kUnitBytes;
      case WeightFormat::int4_g32: return kGroup / 8 * kUnitBytes + kBlockRows * 2;
      default: break;
    }
    return kGroup / (has_nibbles() ? 8 : 4) * kUnitBytes + sets() * (offsets ? 2 : 1) * set_bytes();
  }
  // Bytes of one block of a matrix with `cols` columns; a multiple of 64.
  int64_t block_bytes(int64_t cols) const {
    const int64_t channel_scales = format == WeightFormat::int8 ? kBlockRows * 4 : 0;
    return ceil_div(cols, kGroup) * group_bytes() + channel_scales;
  }
};

// One matrix as its file stores it (see the Python format descriptors), rows contiguous.
struct StoredMatrix {
  WeightLayout layout;
  int64_t rows, cols;
  const void* data;
  const void* scales;  // null for bf16
  // For nibbles and bytes, data are codes [rows][cols] below 16, or levels; scales and offsets are
  // floats [rows][ceil(cols / group_size)]; offsets null where the layout has none.
  const float* offsets = nullptr;
  int64_t group_size = 0;
};

// One packed matrix [rows, cols].
class PackedMatrix {
 public:
  PackedMatrix(const WeightLayout& layout, int64_t rows, int64_t cols);
  // Over memory that somebody owns, packed before; std::invalid_argument if its size does not fit.
  PackedMatrix(const WeightLayout& layout, int64_t rows, int64_t cols, Buffer memory);
  // Takes `m` for its data; sizes and layout are this matrix's own.
  void pack(StoredMatrix m);

  WeightLayout layout;
  int64_t rows, cols;
  Buffer buffer;
};

// The experts of one layer: per expert the gate and up rows interleaved by blocks (they are read
// together), then the down matrix.
class PackedExperts {
 public:
  PackedExperts(const WeightLayout& gate_up_layout, const WeightLayout& down_layout,
                int64_t num_experts, int64_t hidden_size, int64_t intermediate_size);
  // Over memory that somebody owns, packed before; std::invalid_argument if its size does not fit.
  PackedExperts(const WeightLayout& gate_up_layout, const WeightLayout& down_layout,
                int64_t num_experts, int64_t hidden_size, int64_t intermediate_size, Buffer memory);
  enum class Projection { gate, up, down };
  // Data of one projection of one expert; sizes and layout are this object's own.
  void pack(int64_t expert, Projection projection, StoredMatrix m);

  int64_t gate_up_bytes() const;  // of one expert
  int64_t down_bytes() const;
  const uint8_t* gate_up(int64_t expert) const;
  const uint8_t* down(int64_t expert) const;

  WeightLayout gate_up_layout, down_layout;
  int64_t num_experts, hidden_size, intermediate_size;
  Buffer buffer;
};

}  // namespace ktcore
