// Expert and linear weights in the order in which the kernels read them.
//
// A matrix [rows, cols] is cut into strips of 16 rows; a strip is one contiguous run of memory that
// a matrix-vector product reads once, front to back. In a strip, each 64-byte unit holds the same
// few columns of all 16 rows, one 32-bit lane a row, which is what the dot-product instructions
// take (four int8 or two bf16 a lane), so no lane is ever shuffled:
//
//   bf16      unit = 2 columns
//   int8      unit = 4 columns, stored as unsigned (value + 128); then 16 float scales
//   int4_g32  unit = 8 columns: the low nibbles are columns 0-3, the high nibbles columns 4-7, both
//             unsigned (value + 8); then per group of 32 columns 16 bf16 scales
//
// Two strips make a block of 32 rows, the unit of work: 32 outputs are one activation group of the
// next matrix. Rows are padded to whole blocks and columns to whole groups with zero weights.
#pragma once

#include "common/buffer.h"
#include "common/platform.h"
#include "common/types.h"

namespace ktcore {

static constexpr int64_t kStripRows = 16;
static constexpr int64_t kBlockRows = 32;

// Bytes of one strip of a matrix with `cols` columns; a multiple of 64.
static constexpr int64_t strip_bytes(WeightFormat format, int64_t cols) {
  const int64_t groups = ceil_div(cols, kGroup);
  switch (format) {
    case WeightFormat::bf16: return groups * kGroup * kStripRows * 2;
    case WeightFormat::int8: return groups * kGroup * kStripRows + kStripRows * 4;
    case WeightFormat::int4_g32: return round_up(groups * (kGroup * kStripRows / 2 + kStripRows * 2), 64);
  }
  return 0;
}

// One matrix as its file stores it (see the Python format descriptors), rows contiguous.
struct StoredMatrix {
  WeightFormat format;
  int64_t rows, cols;
  const void* data;
  const void* scales;  // null for bf16
};

// Packs rows [row0, row0 + 16) of `source` into the strip at `out`; rows past the end become zeros.
void pack_strip(const StoredMatrix& source, int64_t row0, uint8_t* out);

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
