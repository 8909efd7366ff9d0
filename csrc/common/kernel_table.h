// What one instruction set offers: plain functions over plain data. Everything that varies with the
// instruction set is behind this table, and each table is compiled with its own flags.
#pragma once

#include "common/packed.h"
#include "common/types.h"

namespace ktcore {

class ThreadPool;

// A set of consecutive rows that the kernels compute together, as one register-blocked tile.
struct TokenTile {
  int32_t first;   // index of the first (token, expert) pair, or of the first token
  int32_t tokens;  // how many
  bool fine;  // whether their activations are taken more finely than others': see FormatKernels
};

struct ActiveExpert {
  int64_t number;                                // among all of the layer
  const float *gate_bias, *up_bias, *down_bias;  // each may be null
  // [hidden_size] and [intermediate_size], null unless the layout is reordered.
  const int32_t *gate_columns, *up_columns, *down_columns;
};

// Some of an expert's tiles, all fine or none, that go through a block together.
struct Portion {
  int32_t expert;        // among the active ones
  int32_t first, count;  // tiles
};

// How far ahead of its loads a thread asks for the weights of few tokens, in bytes, for either cache;
// with many tokens, of how many lines it asks for one: 2 where the processor fetches them in pairs.
struct Prefetch {
  int64_t first_level, second_level, panel_step;
};

// How finely activations are rounded: the rows of a tile that a token takes, and for integers of 16 bits the
// largest. With bytes, what those that stand for weights are larger by.
struct Rounding {
  int planes;
  int32_t largest, byte_bias;
};

// Tokens to encode, one after the other, as tiles of one token.
struct EncodeJob {
  ConstRows x;
  int64_t tokens, cols;
  const int32_t* columns;  // [cols], in which order; null: in their own
  Rounding rounding;
  // [tokens], becomes 1 for those whose activations are taken more finely than others'; null where none are.
  uint8_t* fine;
  uint8_t* encoded;
};

// One call of `moe`, planned: pairs (token, expert) are sorted by expert. All memory is the caller's.
struct MoeJob {
  ConstRows x;
  Rows out;
  int64_t tokens, hidden_size, intermediate_size;
  const WeightLayout *gate_up, *down;
  const BlockRun *gate_up_runs, *down_runs;  // a pair of gate and up counts as one block
  int64_t runs;
  const int32_t* pair_token;
  const float* pair_weight;
  int64_t experts;  // how many are active
  const ActiveExpert* expert;
  const TokenTile* tiles;
  const Portion* portion;
  int64_t portions;
  Activation activation;
  Rounding rounding, mid_rounding;  // for gate and up, and for down
  const uint8_t* tokens_encoded;    // unless the layout is reordered
  // What gate and up leave, as down takes it: 32 columns, [tokens][32], as group number `group` of a tile.
  void (*encode_mid)(const float* columns, int64_t tokens, int64_t count, Rounding, uint8_t* tile,
                     int64_t group, int64_t groups);
  // Scratch: of each thread, which portion it has at hand, or -1, and that portion's encoded tiles (twice, for gate and
  // for up, where the layout is reordered); encoded tiles for down, and the f32 sum.
  int64_t* at_hand;
  uint8_t* portion_encoded;
  int64_t portion_bytes;  // of a thread
  uint8_t* mid_encoded;
  int64_t mid_token_bytes;
  float* sum;
  Prefetch gate_up_prefetch, down_prefetch;
};

struct LinearJob {
  Rows out;
  int64_t tokens, rows, cols;
  const WeightLayout* layout;
  const uint8_t* weight;
  const float* bias;     // may be null
  const int32_t* order;  // [tokens], the tokens that tiles number; null: in their own order
  const TokenTile* tiles;
  int64_t tile_count;
  Rounding rounding;
  const uint8_t* tokens_encoded;
  uint8_t* tiles_encoded;
  Prefetch prefetch;
};

struct RouteJob {
  const float* logits;
  int64_t stride, tokens, num_experts, top_k;
  Scoring scoring;
  const float* correction_bias;  // may be null; steers the choice, not the weight
  int64_t n_group, topk_group;
  bool renormalize;
  float scale;
  int64_t* ids;
  float* weights;
};

// Normalises rows of `size` over their root mean square: of x, or of x + residual, which goes to `sum`.
struct NormJob {
  ConstHeads x;
  ConstHeads residual;  // data may be null
  Heads sum, out;
  int64_t tokens, heads, size;
  const float* weight;  // [size]
  float eps;
};

// Rotates pairs of the first `rotary_size` columns of every head by its token's position.
struct RotaryJob {
  ConstHeads x;
  Heads out;  // may be x
  int64_t tokens, heads, head_size, rotary_size;
  const float *cos, *sin;  // [positions, rotary_size / 2]
  int64_t table_positions;
  const int64_t* positions;  // [tokens]
  bool interleaved;          // pairs are neighbours; else the halves of the columns
};

// Keys and values in pages of kPagePositions positions: keys [page, head, key_size, position], so that a
// vector holds one column of neighbouring positions; values [page, head, position, value_size].
//
// Latent pages (multi-head latent attention) hold one head of keys position by position, of which the
// first value_size columns are the values too.
struct KvPages {
  void* keys;
  void* values;
  DType dtype;
  int64_t pages, heads, key_size, value_size;
  int64_t key_stride, value_stride;  // elements from page to page
  bool latent;                       // values is keys, and value_stride is key_stride
};

struct StoreKvJob {
  ConstHeads key, value;
  int64_t tokens;
  KvPages pages;
  const int64_t* slots;  // [tokens]: page * kPagePositions + position in it; -1: not stored
};

// Rows (token, head) of one sequence that share a head of keys and values, up to kAttentionRows.
struct AttentionTile {
  int32_t sequence, kv_head, rows;
  int32_t spans;       // of positions that they see
  int64_t first;       // token * group + head in the group
  int64_t first_part;  // number of its first span's part, where spans are shared out
};

struct AttentionJob {
  ConstHeads query;
  Heads out;
  int64_t tokens, heads;
  KvPages pages;
  const int32_t* page_table;  // [sequences, table_stride]
  int64_t table_stride;
  const int64_t* lengths;      // [sequences], of positions, those of the queries included
  const int64_t* query_begin;  // [sequences + 1], in tokens
  float scale;
  const AttentionTile* tiles;
  int64_t tile_count;
  int64_t parts;             // how many spans of tiles are shared out; 0: every tile is one task
  float* part;               // their results, attention_part_floats() each
  float* work;               // attention_work_floats() for every thread
  const int64_t* part_tile;  // [parts]
};

// Floats that queries, powers, and a page's keys and values take as pairs of bf16: see attention_tiles.h.
static constexpr int64_t attention_tile_floats(const KvPages& pages) {
  const int64_t keys = round_up(pages.key_size, kGroup);
  const int64_t values = round_up(pages.value_size, kGroup);
  return kAttentionRows * (keys + kPagePositions) + kPagePositions * (keys + values);
}
// Floats of a tile's sums over a span, and of a thread's own memory.
static constexpr int64_t attention_part_floats(const KvPages& pages) {
  return kAttentionRows * (2 + round_up(pages.value_size, kGroup));
}
static constexpr int64_t attention_work_floats(const KvPages& pages) {
  return 2 * attention_part_floats(pages) + kAttentionRows * (pages.key_size + kPagePositions) +
         kPagePositions * kGroup + (pages.latent ? pages.key_size * kPagePositions : 0) +
         attention_tile_floats(pages);
}

struct DequantizeJob {
  StoredFormat format;
  int64_t rows, cols;
  const void* data;
  const void* scales;
  void* out;
  DType dtype;
};

struct QuantizeJob {
  StoredFormat format;
  ConstRows x;
  int64_t rows, cols;
  void* data;
  void* scales;
};

// How one weight format is computed on one instruction set.
struct FormatKernels {
  // What comes before the others: activations as gate and up, or linear, take them.
  void (*encode)(const EncodeJob&, ThreadPool&);
  // The two halves of `moe`. Down and its encoding are null where another accuracy's take what gate and up leave.
  void (*gate_up)(const MoeJob&, ThreadPool&);
  decltype(MoeJob::encode_mid) encode_mid;
  void (*down)(const MoeJob&, ThreadPool&);
  void (*linear)(const LinearJob&, ThreadPool&);
  int max_rows;        // rows of the largest tile; a token takes `planes` rows
  int max_rows_alone;  // of one that is an expert's, or a call's, only one
  // Tiles whose activations, of so many bytes a token, go through a block together.
  int (*portion_tiles)(int64_t token_bytes);
  int planes;
  // Bytes of one row of an encoded tile with `cols` columns.
  int64_t (*row_bytes)(int64_t cols);
  // Whether some tokens' activations are taken more finely than others', in tiles of their own: those that the
  // format's encoding would change too much.
  bool marks_fine;
};

// How exact activations are taken: for exact results, or as bf16 or signed bytes are.
enum class Accuracy : int { exact = 0, bf16 = 1, int8 = 2 };

struct AllFormats {
  FormatKernels of[kWeightFormats];
};

struct KernelTable {
  const char* name;
  // What bf16 weights and their activations are multiplied as: "bf16", "int16" or "float32".
  const char* bf16_products;
  AllFormats formats[3];  // by Accuracy
  void (*route)(const RouteJob&, ThreadPool&);
  void (*rms_norm)(const NormJob&, ThreadPool&);
  void (*rotary)(const RotaryJob&, ThreadPool&);
  void (*store_kv)(const StoreKvJob&, ThreadPool&);
  void (*attention)(const AttentionJob&, ThreadPool&);
  void (*dequantize)(const DequantizeJob&, ThreadPool&);
  void (*quantize)(const QuantizeJob&, ThreadPool&);
  // Loops that measure the machine's limits: each returns the operations it has done.
  double (*spin_int8)(int64_t iterations);
  double (*spin_bf16)(int64_t iterations);
  double (*spin_f32)(int64_t iterations);
  // Reads every byte once and returns something that depends on all of them.
  uint64_t (*read)(const uint8_t* data, size_t bytes);
};

}  // namespace ktcore
