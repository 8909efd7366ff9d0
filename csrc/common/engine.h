// One operator call: plan it, find scratch memory, hand it to an instruction set's kernels.
// Arguments have been checked by the caller except where said.
#pragma once

#include "common/kernel_table.h"
#include "common/packed.h"

namespace ktcore {

struct MoeArgs {
  const PackedExperts* experts;
  ConstRows x;
  Rows out;
  int64_t tokens, top_k;
  const int64_t* ids;  // [tokens, top_k]; -1: not computed here. Checked: throws std::out_of_range
  const float* weights;  // [tokens, top_k]
  // Of every expert, [experts, intermediate_size] and [experts, hidden_size]; each may be null.
  const float *gate_bias, *up_bias, *down_bias;
  Activation activation;
  bool exact;
};

struct LinearArgs {
  const PackedMatrix* weight;
  ConstRows x;
  Rows out;
  int64_t tokens;
  const float* bias;
  bool exact;
};

struct AttentionArgs {
  ConstHeads query;
  Heads out;
  int64_t tokens, heads;
  KvPages pages;
  // All of these are checked: throws std::out_of_range, naming the argument.
  const int32_t* page_table;  // [sequences, table_stride]
  int64_t table_stride;
  const int64_t* lengths;      // [sequences]
  const int64_t* query_begin;  // [sequences + 1], from 0 to tokens
  int64_t sequences;
  float scale;
};

void moe(const KernelTable& kernels, const MoeArgs& args);
void linear(const KernelTable& kernels, const LinearArgs& args);
void route(const KernelTable& kernels, const RouteJob& job);
void rms_norm(const KernelTable& kernels, const NormJob& job);
void rotary(const KernelTable& kernels, const RotaryJob& job);     // checks the positions
void store_kv(const KernelTable& kernels, const StoreKvJob& job);  // checks the slots
void attention(const KernelTable& kernels, const AttentionArgs& args);
void dequantize(const KernelTable& kernels, const DequantizeJob& job);
void quantize(const KernelTable& kernels, const QuantizeJob& job);

enum class DotKind { int8, bf16, f32 };
// Operations per second that `threads` threads reach in registers, in 1e9 (a multiply-add is two).
double measure_dot_peak(const KernelTable& kernels, DotKind kind, int threads);
// Bytes per second that `threads` threads read from `bytes` of memory, in 1e9. Best of a few passes.
double measure_read_bandwidth(const KernelTable& kernels, int threads, size_t bytes);

// How far ahead weights of a layout are asked for that are multiplied with so many rows: what is best for the
// processor, or what has been set, for measuring; of negative numbers or no step, the best again.
Prefetch prefetch(const WeightLayout& layout, int64_t rows);
void set_prefetch(Prefetch prefetch);

}  // namespace ktcore
