// Expert and linear weights in the order in which the kernels read them.
//
// A matrix [rows, cols] is cut into blocks of 32 rows; a block is one contiguous run of memory that
// a matrix-vector product reads once, front to back. In a block, each 128-byte unit holds the same
// few columns of all 32 rows, mostly one 32-bit lane a row, which is what the dot-product
// instructions take (pairs of 16 bits a lane, once smaller codes are widened), so no lane is ever
// shuffled:
//
//   bf16      unit = 2 columns; at the end 32 float scales, of the integers that kernels may make of a row
//   f16, f32  columns of 32 numbers
//   f8        unit = 4 columns of e4m3, of which bytes 0 and 2, then 1 and 3 hold neighbours; scales as for codes
//   int8      unit = 4 columns; at the end 32 float scales
//   codesN    integers less a bias, N bits each: weight = scale * (code - bias) + offset. The codes of
//             a group of 32 columns are N units. Byte j of a lane has bits of columns 4 i + j; which, and
//             where, quad_parts() tells. Codes of 8 bits are signed and have no bias.
//   tableN    as codesN, but the codes number 8 or 16 levels, which the layout lists
//   ..._g16   the same, with scales for 16 columns each
//
// A scale is up to two factors. The outer ones are floats for `span` groups, before the first of them, and
// offsets follow them. The inner ones are signed bytes: one for each row and set, which the outer scale
// multiplies; then those that the outer offset multiplies or, where there are only inner offsets, the outer
// scale (zero points). Both may be halves of one byte. They stand behind the group's codes, for two sets
// before them: all in the order in which it is read, from one end of a block to the other. (The scales of
// Q4_K behind a block's last group cost a Zen 5 10 % of the bandwidth; scales and units out of order in a
// group cost a Zen 4 up to 20 %.)
//
// A third factor may stand behind all groups, as that of int8 does: a float for each row. So the others are
// no longer than the file's: what they have in common, or would be too small with, is the rows'.
//
// All stored weight formats that are small integers (see Codes in ktcore/formats/base.py) become one
// of these.
//
// Reordered matrices (act-order) have their columns sorted by group. Which column of the activations
// each is stands behind all blocks, as 32-bit integers.
//
// 32 outputs of one matrix are one activation group of the next. Rows are padded to whole blocks
// and columns to whole groups with zero weights.
#pragma once

#include <vector>

#include "common/buffer.h"
#include "common/platform.h"
#include "common/types.h"

namespace ktcore {

static constexpr int64_t kBlockRows = 32;
static constexpr int64_t kUnitBytes = kBlockRows * 4;

// Floats as integers of 16 bits: those of e4m3 are multiples of a 32nd, rounded; those of bf16 are so many to the
// largest of a row.
static constexpr int32_t kF8Multiple = 32, kLargestF8 = 480 * kF8Multiple, kLargestBf16 = 16383;

// What a matrix's blocks look like. Its functions are always inlined: see platform.h.
struct WeightLayout {
  WeightFormat format = WeightFormat::bf16;
  // For f8, codes and tables alone:
  ScaleType scale_type = ScaleType::f32;  // of the outer scales and offsets
  int64_t span = 1;                       // groups that share an outer scale
  bool inner_scales = false;
  bool offsets = false;  // outer ones
  bool inner_offsets = false;
  bool inner_nibbles = false;  // of codes2_g16: both inner ones, 0 to 15, share a byte
  int32_t bias = 0;
  int8_t levels[16] = {};
  int32_t largest = 128;  // that a weight is before it is scaled, its sign left out
  bool row_scales = false;
  bool reordered = false;  // the columns are in an order of their own, which the matrix holds
  // For integers: whether activations of eight bits are exact enough, if exact results are not asked for.
  bool byte_activations = false;

  // Whether sums of products with such activations fit where they are made: in 32 bits with weights of 2 and 3 bits and
  // two sets, times their inner scales.
  KT_INLINE bool byte_sums_fit() const {
    const bool multiplied =
        format == WeightFormat::codes2_g16 || format == WeightFormat::codes3_g16;
    return !multiplied || (inner_scales && largest <= 4);
  }

  KT_INLINE bool operator==(const WeightLayout&) const = default;

  // Bits of a column's code, 0 for formats that have none.
  KT_INLINE int64_t code_bits() const {
    switch (format) {
      case WeightFormat::codes2:
      case WeightFormat::codes2_g16: return 2;
      case WeightFormat::codes3:
      case WeightFormat::codes3_g16:
      case WeightFormat::table3:
      case WeightFormat::table3_g16: return 3;
      case WeightFormat::codes4:
      case WeightFormat::codes4_g16:
      case WeightFormat::table4:
      case WeightFormat::table4_g16: return 4;
      case WeightFormat::codes5:
      case WeightFormat::codes5_g16: return 5;
      case WeightFormat::codes6:
      case WeightFormat::codes6_g16: return 6;
      case WeightFormat::codes8:
      case WeightFormat::codes8_g16: return 8;
      default: return 0;
    }
  }
  // Whether codes number levels.
  KT_INLINE bool is_table() const {
    switch (format) {
      case WeightFormat::table3:
      case WeightFormat::table3_g16:
      case WeightFormat::table4:
      case WeightFormat::table4_g16: return true;
      default: return false;
    }
  }
  KT_INLINE bool scaled() const { return code_bits() > 0 || format == WeightFormat::f8; }
  // Sets of scales a group.
  KT_INLINE int64_t sets() const {
    switch (format) {
      case WeightFormat::codes2_g16:
      case WeightFormat::codes3_g16:
      case WeightFormat::codes4_g16:
      case WeightFormat::codes5_g16:
      case WeightFormat::codes6_g16:
      case WeightFormat::codes8_g16:
      case WeightFormat::table3_g16:
      case WeightFormat::table4_g16: return 2;
      default: return 1;
    }
  }
  // Sets of outer scales for each `span` groups.
  KT_INLINE int64_t outer_sets() const { return inner_scales || span > 1 ? 1 : sets(); }
  // Bytes of one set of outer scales, or of offsets.
  KT_INLINE int64_t set_bytes() const { return kBlockRows * scale_bytes(scale_type); }
  KT_INLINE int64_t outer_bytes() const {
    return scaled() ? outer_sets() * set_bytes() * (offsets ? 2 : 1) : 0;
  }
  KT_INLINE int64_t inner_bytes() const {
    return sets() * kBlockRows *
           (inner_nibbles ? 1 : (inner_scales ? 1 : 0) + (inner_offsets ? 1 : 0));
  }
  // Of two sets, the scales of the first are needed before the codes of the second.
  KT_INLINE bool inner_first() const { return sets() == 2; }
  // Whether inner scales multiply integers: then a group's two sets are one sum, that the outer scale
  // multiplies.
  KT_INLINE bool folded() const { return inner_scales && sets() == 2; }
  // The largest integer that may stand for an activation, so that such a sum fits.
  KT_INLINE int32_t largest_activation() const {
    constexpr int32_t kLargest = 127 * 256 + 127;  // of a sum of two signed bytes
    const int64_t of_weights = format == WeightFormat::bf16 ? kLargestBf16
                               : format == WeightFormat::f8 ? kLargestF8
                               : folded()                   ? 128 * largest
                                                            : 128;
    const int64_t fits = 0x7fffffff / (kGroup * of_weights);
    return fits < kLargest ? static_cast<int32_t>(fits) : kLargest;
  }
  // What unsigned bytes that stand for weights, before they are scaled, are larger by.
  KT_INLINE int32_t byte_bias() const {
    return is_table() || code_bits() == 8 || code_bits() == 0 ? 128 : bias;
  }
  // The same where sums of 16 products with signed bytes have to fit in 16 bits: what is left out is an offset.
  KT_INLINE int32_t short_bias() const {
    return code_bits() == 5 && sets() == 1 ? 16 : byte_bias();
  }
  // Bytes of the codes or numbers of one group of 32 columns of a block.
  KT_INLINE int64_t value_bytes() const {
    switch (format) {
      case WeightFormat::bf16:
      case WeightFormat::f16: return 16 * kUnitBytes;
      case WeightFormat::f32: return 32 * kUnitBytes;
      case WeightFormat::f8:
      case WeightFormat::int8: return 8 * kUnitBytes;
      default: return code_bits() * kUnitBytes;
    }
  }
  // Bytes of one group with all that is its own.
  KT_INLINE int64_t group_bytes() const { return value_bytes() + (scaled() ? inner_bytes() : 0); }
  // Where in a block the codes or numbers of a group are, its inner scales, and its outer ones.
  KT_INLINE int64_t group_at(int64_t group) const {
    return group * group_bytes() + (group / span + 1) * outer_bytes() +
           (inner_first() ? inner_bytes() : 0);
  }
  KT_INLINE int64_t inner_at(int64_t group) const {
    return inner_first() ? group_at(group) - inner_bytes() : group_at(group) + value_bytes();
  }
  KT_INLINE int64_t outer_at(int64_t group) const {
    return group / span * (span * group_bytes() + outer_bytes());
  }
  // Where in a block of so many groups the scales of its rows are, behind all else.
  KT_INLINE int64_t row_scales_at(int64_t groups) const {
    return groups * group_bytes() + ceil_div(groups, span) * outer_bytes();
  }
  // Bytes of one block of a matrix with `cols` columns; a multiple of 64.
  KT_INLINE int64_t block_bytes(int64_t cols) const {
    int64_t bytes = row_scales_at(ceil_div(cols, kGroup));
    if (row_scales || format == WeightFormat::int8 || format == WeightFormat::bf16) {
      bytes += kBlockRows * 4;
    }
    return round_up(bytes, 64);
  }
};

// Where the codes of a quad (columns 4 i to 4 i + 3 of a group) are: bits [at, at + bits) of each byte of a unit
// are bits [to, to + bits) of them.
struct CodePart {
  int unit, at, to, bits;
};
struct QuadParts {
  int count;
  CodePart part[3];
};

// As few codes as possible are in parts: a byte holds as many as fit whole, two of 3 bits or one of 5 or 6, and what
// is left over in three bytes of a lane makes a code, or in two together with bits of a third that both halves of
// the group share. Units are numbered in the order in which quads need them, so that a block is read from one end to
// the other. Always inlined, too.
static KT_INLINE constexpr QuadParts quad_parts(int bits, int quad) {
  const int half = quad / 4, place = quad % 4;
  switch (bits) {
    case 3: {
      const int own = 2 * half, shared = 1;
      if (place < 2) return {1, {{own, 3 * place, 0, 3}}};
      if (place == 2) return {1, {{shared, 3 * half, 0, 3}}};
      return {2, {{own, 6, 0, 2}, {shared, 6 + half, 2, 1}}};
    }
    case 5: {
      const int pair = quad / 2, own = pair == 0 ? 0 : pair + 1, shared = 1;
      if (quad % 2 == 0) return {1, {{own, 0, 0, 5}}};
      return {2, {{shared, 2 * pair, 0, 2}, {own, 5, 2, 3}}};
    }
    case 6: {
      const int first = 3 * half;
      if (place < 3) return {1, {{first + place, 0, 0, 6}}};
      return {3, {{first, 6, 0, 2}, {first + 1, 6, 2, 2}, {first + 2, 6, 4, 2}}};
    }
    default: return {1, {{quad * bits / 8, quad * bits % 8, 0, bits}}};
  }
}

// Bits [shift, shift + bits) of the codes of a block: see Field in ktcore/formats/base.py.
struct CodeField {
  int64_t at, size;
  int bits;
  int64_t run;
  int shift;
};

// One matrix to pack, rows contiguous.
struct StoredMatrix {
  WeightLayout layout;
  int64_t rows, cols;
  // Numbers of the format's type [rows][cols]; codes are bytes or, where there are fields, blocks of
  // block_size codes, a multiple of 32, in type_size bytes [rows][cols / block_size].
  const void* data;
  std::vector<CodeField> fields = {};
  int64_t block_size = 0, type_size = 0;
  // Of floats [rows][ceil(cols / scale_size)], int8: [rows]; null for bf16, f16 and f32. Offsets and
  // inner scales and offsets (signed bytes [rows][ceil(cols / group_size)]) where the layout has them.
  const float* scales = nullptr;
  const float* row_scales = nullptr;  // [rows], where the layout has them
  const float* offsets = nullptr;
  const int8_t* inner_scales = nullptr;
  const int8_t* inner_offsets = nullptr;
  int64_t scale_size = 0, group_size = 0;
  const int64_t* columns = nullptr;  // where the layout is reordered: [cols], each below cols
};

// Neighbouring blocks of a matrix, which lie one after the other; those of the next expert's matrix
// `stride` bytes behind. A matrix is cut into one run for each NUMA node, so that whoever computes these
// rows reads memory nearby; every output is one run's alone, so that the result does not depend on it.
struct BlockRun {
  int64_t first, end;  // block numbers
  const uint8_t* data;
  int64_t stride;

  KT_INLINE const uint8_t* block(int64_t expert, int64_t number, int64_t block_bytes) const {
    return data + expert * stride + (number - first) * block_bytes;
  }
};

// The run of a block.
static KT_INLINE const BlockRun& run_of(const BlockRun* runs, int64_t block) {
  while (block >= runs->end) ++runs;
  return *runs;
}

// One packed matrix [rows, cols].
class PackedMatrix {
 public:
  PackedMatrix(const WeightLayout& layout, int64_t rows, int64_t cols);
  // Over memory that somebody owns, packed before, which is copied where there are several nodes;
  // std::invalid_argument if its size does not fit.
  PackedMatrix(const WeightLayout& layout, int64_t rows, int64_t cols, Buffer memory);
  // Takes `m` for its data; sizes and layout are this matrix's own.
  void pack(StoredMatrix m);

  const int32_t* columns() const;  // [cols], null unless reordered

  WeightLayout layout;
  int64_t rows, cols;
  Buffer buffer;
};

// The experts of one layer: for each NUMA node, and in it for each expert, a run of blocks of the gate and
// up rows, interleaved (they are read together), then a run of the down matrix's. Where down is
// reordered, gate and up have been given with their rows in its order.
class PackedExperts {
 public:
  PackedExperts(const WeightLayout& gate_up_layout, const WeightLayout& down_layout,
                int64_t num_experts, int64_t hidden_size, int64_t intermediate_size);
  // Over memory that somebody owns, packed before for one node, which is copied where there are several;
  // std::invalid_argument if its size does not fit.
  PackedExperts(const WeightLayout& gate_up_layout, const WeightLayout& down_layout,
                int64_t num_experts, int64_t hidden_size, int64_t intermediate_size, Buffer memory);
  // The same weights as on one node, to be stored.
  PackedExperts in_one_piece() const;
  enum class Projection { gate, up, down };
  // Data of one projection of one expert; sizes and layout are this object's own.
  void pack(int64_t expert, Projection projection, StoredMatrix m);

  // A pair of gate and up counts as one block.
  const std::vector<BlockRun>& gate_up_runs() const { return gate_up_runs_; }
  const std::vector<BlockRun>& down_runs() const { return down_runs_; }
  // [hidden_size], for down [intermediate_size]; null unless the projection's layout is reordered.
  const int32_t* columns(int64_t expert, Projection projection) const;

  WeightLayout gate_up_layout, down_layout;
  int64_t num_experts, hidden_size, intermediate_size;
  Buffer buffer;

 private:
  PackedExperts(const WeightLayout& gate_up_layout, const WeightLayout& down_layout,
                int64_t num_experts, int64_t hidden_size, int64_t intermediate_size, Buffer memory,
                const std::vector<int>& nodes);
  int64_t gate_up_block() const { return 2 * gate_up_layout.block_bytes(hidden_size); }
  int64_t down_block() const { return down_layout.block_bytes(intermediate_size); }
  void copy_from(const PackedExperts& other);
  int32_t* all_columns() const;

  std::vector<BlockRun> gate_up_runs_, down_runs_;
};

}  // namespace ktcore
