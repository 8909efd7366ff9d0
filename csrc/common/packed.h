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

// Bytes of one group of 32 columns of a block.
static constexpr int64_t group_bytes(WeightFormat format) {
  switch (format) {
    case WeightFormat::bf16: return kGroup / 2 * kUnitBytes;
    case WeightFormat::int8: return kGroup / 4 * kUnitBytes;
    case WeightFormat::int4_g32: return kGroup / 8 * kUnitBytes + kBlockRows * 2;
  }
  return 0;
}

// Bytes of one block of a matrix with `cols` columns; a multiple of 64.
static constexpr int64_t block_bytes(WeightFormat format, int64_t cols) {
  const int64_t channel_scales = format == WeightFormat::int8 ? kBlockRows * 4 : 0;
  return ceil_div(cols, kGroup) * group_bytes(format) + channel_scales;
}

// One matrix as its file stores it (see the Python format descriptors), rows contiguous.
struct StoredMatrix {
  WeightFormat format;
  int64_t rows, cols;
  const void* data;
  const void* scales;  // null for bf16
};

// One packed matrix [rows, cols].
class PackedMatrix {
 public:
  PackedMatrix(WeightFormat format, int64_t rows, int64_t cols);
  void pack(const void* data, const void* scales);

  WeightFormat format;
  int64_t rows, cols;
  Buffer buffer;
};

// The experts of one layer: per expert the gate and up rows interleaved by blocks (they are read
// together), then the down matrix.
class PackedExperts {
 public:
  PackedExperts(WeightFormat format, int64_t num_experts, int64_t hidden_size,
                int64_t intermediate_size);
  enum class Projection { gate, up, down };
  // Data of one projection of one expert.
  void pack(int64_t expert, Projection projection, const void* data, const void* scales);

  int64_t gate_up_bytes() const;  // of one expert
  int64_t down_bytes() const;
  const uint8_t* gate_up(int64_t expert) const;
  const uint8_t* down(int64_t expert) const;

  WeightFormat format;
  int64_t num_experts, hidden_size, intermediate_size;
  Buffer buffer;
};

}  // namespace ktcore
