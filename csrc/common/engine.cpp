#include "common/engine.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/cpu_features.h"
#include "common/thread_pool.h"

namespace ktcore {
namespace {

// Negative: what is best for the processor.
std::atomic<int64_t> g_prefetch_first{-1}, g_prefetch_second{-1}, g_prefetch_panel{-1};

// Hands out aligned pieces of one block. Laid out twice: once over nothing, to learn the size.
class Arena {
 public:
  explicit Arena(uint8_t* base) : base_(base) {}
  template <class T>
  void take(T*& p, int64_t count) {
    p = reinterpret_cast<T*>(base_ + used_);
    used_ += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
  }
  size_t used() const { return used_; }

 private:
  uint8_t* base_;
  size_t used_ = 0;
};

// Lays out scratch memory by `layout(Arena&)` in a block that is kept between calls. The caller
// holds the pool's lock.
template <class Layout>
void with_scratch(ThreadPool& pool, Layout&& layout) {
  Arena measure(nullptr);
  layout(measure);
  pool.scratch().reserve(measure.used());
  Arena real(pool.scratch().data());
  layout(real);
}

// Cuts [first, end) into parts of at most `max` that differ by one at most: emit(first, count).
template <class Emit>
void for_each_part(int64_t first, int64_t end, int64_t max, Emit&& emit) {
  const int64_t count = end - first, parts = ceil_div(count, max);
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t size = count / parts + (i < count % parts ? 1 : 0);
    emit(first, size);
    first += size;
  }
}

// Cuts rows into tiles of at most so many, or of `alone` if that makes one.
struct TileSize {
  int64_t max, alone;
};
template <class Emit>
void for_each_tile(int64_t first, int64_t end, TileSize size, bool fine, Emit&& emit) {
  const int64_t max = end - first <= size.alone ? size.alone : size.max;
  for_each_part(first, end, max, [&](int64_t at, int64_t count) {
    emit(TokenTile{static_cast<int32_t>(at), static_cast<int32_t>(count), fine});
  });
}

const float* row_of(const float* matrix, int64_t row, int64_t columns) {
  return matrix == nullptr ? nullptr : matrix + row * columns;
}

// How exact results have to be of weights that activations are multiplied with.
Accuracy accuracy(const WeightLayout& layout, bool exact) {
  if (exact) return Accuracy::exact;
  return layout.byte_activations && layout.byte_sums_fit() ? Accuracy::int8 : Accuracy::bf16;
}
// The same for what gate and up have put out: their product has a long tail, so that bytes would lose as much
// of it as of all that comes before, together more than integer formats may.
Accuracy down_accuracy(bool exact) { return exact ? Accuracy::exact : Accuracy::bf16; }

const FormatKernels& kernels_for(const KernelTable& table, const WeightLayout& layout,
                                 Accuracy accuracy) {
  return table.formats[static_cast<int>(accuracy)].of[static_cast<int>(layout.format)];
}

Rounding rounding(const FormatKernels& kernels, const WeightLayout& layout) {
  return {kernels.planes, layout.largest_activation(), layout.short_bias()};
}

}  // namespace

Prefetch prefetch(const WeightLayout& layout, int64_t rows) {
  const Prefetch set{g_prefetch_first.load(), g_prefetch_second.load(), g_prefetch_panel.load()};
  if (set.first_level >= 0 && set.second_level >= 0 && set.panel_step > 0) return set;
  const int64_t bits = layout.value_bytes() * 8 / (kGroup * kBlockRows);  // of a weight
  switch (processor()) {
    // A Zen 4 is 7 to 24 % faster by itself where a byte or more is read for a weight and few rows take
    // little time; else such weights gain 7 to 20 % from two distances, as those of 5 and 6 bits do.
    case Processor::zen4:
      if (bits >= 8 && rows < bits / 2) return {0, 0, 1};
      if (bits > 4) return {2048, 8192, 1};
      [[fallthrough]];
    // A Zen 5 gains 18 % over 1 KiB, and nothing from a second distance. Neither fetches lines in pairs:
    // every one, against every other one, gains 2 to 15 % with panels.
    case Processor::amd: return {4096, 4096, 1};
    // An Emerald Rapids gains 10 to 15 % over 8 KiB for the first level alone.
    case Processor::other: break;
  }
  return {4096, 8192, 2};
}
void set_prefetch(Prefetch prefetch) {
  g_prefetch_first.store(prefetch.first_level);
  g_prefetch_second.store(prefetch.second_level);
  g_prefetch_panel.store(prefetch.panel_step);
}

void moe(const KernelTable& table, const MoeArgs& args) {
  const PackedExperts& experts = *args.experts;
  const FormatKernels& gate_up =
      kernels_for(table, experts.gate_up_layout, accuracy(experts.gate_up_layout, args.exact));
  const FormatKernels& down = kernels_for(table, experts.down_layout, down_accuracy(args.exact));
  const int64_t slots = args.tokens * args.top_k;

  const auto pool = default_pool();
  std::lock_guard<std::mutex> guard(pool->lock());

  MoeJob job{};
  job.x = args.x;
  job.out = args.out;
  job.tokens = args.tokens;
  job.hidden_size = experts.hidden_size;
  job.intermediate_size = experts.intermediate_size;
  job.activation = args.activation;
  job.gate_up = &experts.gate_up_layout;
  job.down = &experts.down_layout;
  job.gate_up_runs = experts.gate_up_runs().data();
  job.down_runs = experts.down_runs().data();
  job.runs = static_cast<int64_t>(experts.gate_up_runs().size());
  job.rounding = rounding(gate_up, experts.gate_up_layout);
  job.mid_rounding = rounding(down, experts.down_layout);
  const int planes = job.rounding.planes, mid_planes = job.mid_rounding.planes;
  const int64_t in_token_bytes = planes * gate_up.row_bytes(job.hidden_size);
  const int64_t mid_token_bytes = mid_planes * down.row_bytes(job.intermediate_size);
  // Both halves use the same tiles.
  const TileSize tile_size{
      std::min(gate_up.max_rows / planes, down.max_rows / mid_planes),
      std::min(gate_up.max_rows_alone / planes, down.max_rows_alone / mid_planes)};
  const int64_t portion_tiles =
      std::min(gate_up.portion_tiles(in_token_bytes), down.portion_tiles(mid_token_bytes));
  const int64_t portion_tokens =
      std::min(slots, std::max<int64_t>(portion_tiles * tile_size.max, tile_size.alone));
  job.portion_bytes = portion_tokens * in_token_bytes * (experts.gate_up_layout.reordered ? 2 : 1);
  job.encode_mid = down.encode_mid;
  job.mid_token_bytes = mid_token_bytes;

  // Pairs are sorted by kind: twice their expert's number, and one more if their token is fine.
  const int64_t kinds = 2 * experts.num_experts;
  uint8_t *fine, *encoded;
  int32_t *begin, *cursor, *pair_token;
  float* pair_weight;
  ActiveExpert* active;
  TokenTile* tiles;
  Portion* portions;
  with_scratch(*pool, [&](Arena& arena) {
    arena.take(fine, gate_up.marks_fine ? args.tokens : 0);
    arena.take(begin, kinds + 1);
    arena.take(cursor, kinds);
    arena.take(pair_token, slots);
    arena.take(pair_weight, slots);
    arena.take(active, std::min(slots, experts.num_experts));
    arena.take(tiles, slots);
    arena.take(portions, slots);
    arena.take(encoded, args.tokens * in_token_bytes);
    arena.take(job.at_hand, pool->size());
    arena.take(job.portion_encoded, pool->size() * job.portion_bytes);
    arena.take(job.mid_encoded, slots * mid_token_bytes);
    arena.take(job.sum, args.tokens * round_up(job.hidden_size, kBlockRows));
  });

  if (!gate_up.marks_fine) fine = nullptr;
  // Where columns are in an order of their own for each expert, only to see which tokens are fine.
  if (fine != nullptr || !experts.gate_up_layout.reordered) {
    gate_up.encode({args.x, args.tokens, job.hidden_size, nullptr, job.rounding, fine, encoded},
                   *pool);
  }
  job.tokens_encoded = encoded;
  const auto kind_of = [&](int64_t slot) {
    return 2 * args.ids[slot] + (fine == nullptr ? 0 : fine[slot / args.top_k]);
  };

  // Counting sort of the (token, expert) pairs; within a kind in token order.
  std::fill(begin, begin + kinds + 1, 0);
  for (int64_t i = 0; i < slots; ++i) {
    const int64_t id = args.ids[i];
    if (id < -1 || id >= experts.num_experts) {
      throw std::out_of_range("topk_ids[" + std::to_string(i / args.top_k) + ", " +
                              std::to_string(i % args.top_k) + "] is " + std::to_string(id) +
                              "; expected -1 (not computed here) or 0 to " +
                              std::to_string(experts.num_experts - 1));
    }
    if (id >= 0) ++begin[kind_of(i) + 1];
  }
  for (int64_t kind = 0; kind < kinds; ++kind) {
    begin[kind + 1] += begin[kind];
    cursor[kind] = begin[kind];
  }
  for (int64_t i = 0; i < slots; ++i) {
    if (args.ids[i] < 0) continue;
    const int32_t at = cursor[kind_of(i)]++;
    pair_token[at] = static_cast<int32_t>(i / args.top_k);
    pair_weight[at] = args.weights[i];
  }

  int32_t tile_count = 0, active_count = 0;
  for (int64_t e = 0; e < experts.num_experts; ++e) {
    const int32_t first = begin[2 * e], middle = begin[2 * e + 1], end = begin[2 * e + 2];
    if (first == end) continue;
    ActiveExpert& expert = active[active_count++];
    expert.number = e;
    expert.gate_columns = experts.columns(e, PackedExperts::Projection::gate);
    expert.up_columns = experts.columns(e, PackedExperts::Projection::up);
    expert.down_columns = experts.columns(e, PackedExperts::Projection::down);
    expert.gate_bias = row_of(args.gate_bias, e, experts.intermediate_size);
    expert.up_bias = row_of(args.up_bias, e, experts.intermediate_size);
    expert.down_bias = row_of(args.down_bias, e, experts.hidden_size);
    const auto cut = [&](int64_t from, int64_t to, bool fine) {
      const int32_t begin = tile_count;
      for_each_tile(from, to, tile_size, fine, [&](TokenTile tile) { tiles[tile_count++] = tile; });
      for_each_part(begin, tile_count, portion_tiles, [&](int64_t at, int64_t count) {
        portions[job.portions++] = {active_count - 1, static_cast<int32_t>(at),
                                    static_cast<int32_t>(count)};
      });
    };
    cut(first, middle, false);
    cut(middle, end, true);
  }
  job.pair_token = pair_token;
  job.pair_weight = pair_weight;
  job.experts = active_count;
  job.expert = active;
  job.tiles = tiles;
  job.portion = portions;
  const int64_t rows = active_count == 0 ? 0 : begin[kinds] / active_count;
  job.gate_up_prefetch = prefetch(experts.gate_up_layout, rows);
  job.down_prefetch = prefetch(experts.down_layout, rows);
  gate_up.gate_up(job, *pool);
  down.down(job, *pool);
}

void linear(const KernelTable& table, const LinearArgs& args) {
  const PackedMatrix& weight = *args.weight;
  const FormatKernels& kernels =
      kernels_for(table, weight.layout, accuracy(weight.layout, args.exact));
  const auto pool = default_pool();
  std::lock_guard<std::mutex> guard(pool->lock());

  LinearJob job{};
  job.out = args.out;
  job.tokens = args.tokens;
  job.rows = weight.rows;
  job.cols = weight.cols;
  job.layout = &weight.layout;
  job.weight = weight.buffer.data();
  job.bias = args.bias;
  job.rounding = rounding(kernels, weight.layout);
  job.prefetch = prefetch(weight.layout, args.tokens);
  const int64_t token_bytes = job.rounding.planes * kernels.row_bytes(weight.cols);
  const int64_t marked = kernels.marks_fine ? args.tokens : 0;
  uint8_t *fine, *encoded;
  int32_t* order;
  TokenTile* tiles;
  with_scratch(*pool, [&](Arena& arena) {
    arena.take(fine, marked);
    arena.take(order, marked);
    arena.take(tiles, args.tokens);
    arena.take(encoded, args.tokens * token_bytes);
    arena.take(job.tiles_encoded, args.tokens * token_bytes);
  });
  if (marked == 0) fine = nullptr;
  kernels.encode({args.x, args.tokens, weight.cols, weight.columns(), job.rounding, fine, encoded},
                 *pool);
  job.tokens_encoded = encoded;
  // How many tokens are not fine: these come first.
  const int64_t plain = fine == nullptr ? args.tokens : std::count(fine, fine + args.tokens, 0);
  if (plain < args.tokens) {
    int64_t next[] = {0, plain};
    for (int64_t t = 0; t < args.tokens; ++t) order[next[fine[t]]++] = static_cast<int32_t>(t);
    job.order = order;
  }
  const TileSize tile_size{kernels.max_rows / job.rounding.planes,
                           kernels.max_rows_alone / job.rounding.planes};
  const auto emit = [&](TokenTile tile) { tiles[job.tile_count++] = tile; };
  for_each_tile(0, plain, tile_size, false, emit);
  for_each_tile(plain, args.tokens, tile_size, true, emit);
  job.tiles = tiles;
  kernels.linear(job, *pool);
}

void route(const KernelTable& table, const RouteJob& job) {
  const auto pool = default_pool();
  std::lock_guard<std::mutex> guard(pool->lock());
  table.route(job, *pool);
}

namespace {

void check_index(const char* name, int64_t i, int64_t value, int64_t least, int64_t end) {
  if (value >= least && value < end) return;
  throw std::out_of_range(std::string(name) + "[" + std::to_string(i) + "] is " +
                          std::to_string(value) + "; expected " + std::to_string(least) + " to " +
                          std::to_string(end - 1));
}

}  // namespace

void rms_norm(const KernelTable& table, const NormJob& job) {
  const auto pool = default_pool();
  std::lock_guard<std::mutex> guard(pool->lock());
  table.rms_norm(job, *pool);
}

void rotary(const KernelTable& table, const RotaryJob& job) {
  for (int64_t t = 0; t < job.tokens; ++t) {
    check_index("positions", t, job.positions[t], 0, job.table_positions);
  }
  const auto pool = default_pool();
  std::lock_guard<std::mutex> guard(pool->lock());
  table.rotary(job, *pool);
}

void store_kv(const KernelTable& table, const StoreKvJob& job) {
  for (int64_t t = 0; t < job.tokens; ++t) {
    check_index("slots", t, job.slots[t], -1, job.pages.pages * kPagePositions);
  }
  const auto pool = default_pool();
  std::lock_guard<std::mutex> guard(pool->lock());
  table.store_kv(job, *pool);
}

void attention(const KernelTable& table, const AttentionArgs& args) {
  const KvPages& pages = args.pages;
  const int64_t group = args.heads / pages.heads;
  // How many tiles a sequence's queries make for each head of keys, and the spans that these see.
  int64_t tile_count = 0, most_spans = 0;
  check_index("query_begin", 0, args.query_begin[0], 0, 1);
  for (int64_t s = 0; s < args.sequences; ++s) {
    const int64_t tokens = args.query_begin[s + 1] - args.query_begin[s];
    check_index("query_begin", s + 1, args.query_begin[s + 1], args.query_begin[s],
                args.tokens + 1);
    check_index("lengths", s, args.lengths[s], tokens, args.table_stride * kPagePositions + 1);
    if (tokens == 0) continue;
    for (int64_t i = 0; i < ceil_div(args.lengths[s], kPagePositions); ++i) {
      check_index("page_table", s * args.table_stride + i,
                  args.page_table[s * args.table_stride + i], 0, pages.pages);
    }
    tile_count += pages.heads * ceil_div(tokens * group, kAttentionRows);
    most_spans = std::max(most_spans, ceil_div(args.lengths[s], kSpanPositions));
  }
  check_index("query_begin", args.sequences, args.query_begin[args.sequences], args.tokens,
              args.tokens + 1);
  if (tile_count == 0) return;

  const auto pool = default_pool();
  std::lock_guard<std::mutex> guard(pool->lock());
  // With few tiles, threads share out their spans as well.
  const bool split = most_spans > 1 && tile_count < 4 * pool->size();
  AttentionJob job{};
  job.query = args.query;
  job.out = args.out;
  job.tokens = args.tokens;
  job.heads = args.heads;
  job.pages = pages;
  job.page_table = args.page_table;
  job.table_stride = args.table_stride;
  job.lengths = args.lengths;
  job.query_begin = args.query_begin;
  job.scale = args.scale;
  const int64_t most_parts = split ? tile_count * most_spans : 0;
  AttentionTile* tiles;
  int64_t* part_tile;
  with_scratch(*pool, [&](Arena& arena) {
    arena.take(tiles, tile_count);
    arena.take(part_tile, most_parts);
    arena.take(job.part, most_parts * attention_part_floats(pages));
    arena.take(job.work, pool->size() * attention_work_floats(pages));
  });
  for (int64_t s = 0; s < args.sequences; ++s) {
    const int64_t tokens = args.query_begin[s + 1] - args.query_begin[s], rows = tokens * group;
    // The last tiles see most: they are first, so that no thread is left with one at the end.
    for (int64_t n = ceil_div(rows, kAttentionRows) - 1; n >= 0; --n) {
      const int64_t first = n * kAttentionRows;
      const int64_t count = std::min(rows - first, kAttentionRows);
      const int64_t seen = args.lengths[s] - tokens + (first + count - 1) / group + 1;
      for (int64_t head = 0; head < pages.heads; ++head) {
        AttentionTile& tile = tiles[job.tile_count];
        tile = {static_cast<int32_t>(s),
                static_cast<int32_t>(head),
                static_cast<int32_t>(count),
                static_cast<int32_t>(ceil_div(seen, kSpanPositions)),
                first,
                job.parts};
        if (split) {
          for (int32_t i = 0; i < tile.spans; ++i) part_tile[job.parts++] = job.tile_count;
        }
        ++job.tile_count;
      }
    }
  }
  job.tiles = tiles;
  job.part_tile = part_tile;
  table.attention(job, *pool);
}

void dequantize(const KernelTable& table, const DequantizeJob& job) {
  const auto pool = default_pool();
  std::lock_guard<std::mutex> guard(pool->lock());
  table.dequantize(job, *pool);
}

void quantize(const KernelTable& table, const QuantizeJob& job) {
  const auto pool = default_pool();
  std::lock_guard<std::mutex> guard(pool->lock());
  table.quantize(job, *pool);
}

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace

double measure_dot_peak(const KernelTable& table, DotKind kind, int threads) {
  const auto spin = kind == DotKind::int8   ? table.spin_int8
                    : kind == DotKind::bf16 ? table.spin_bf16
                                            : table.spin_f32;
  ThreadPool pool(threads);
  // Sized to take some tens of milliseconds, in pieces small enough to share out evenly.
  auto start = Clock::now();
  spin(100000);
  const auto iterations = static_cast<int64_t>(100000 * (2e-3 / seconds_since(start))) + 1;
  double best = 0;
  std::vector<double> operations(static_cast<size_t>(pool.size()));
  for (int pass = 0; pass < 5; ++pass) {
    std::fill(operations.begin(), operations.end(), 0.0);
    start = Clock::now();
    parallel_for(pool, 10 * pool.size(), [&](int64_t, int thread) {
      operations[static_cast<size_t>(thread)] += spin(iterations);
    });
    const double seconds = seconds_since(start);
    double total = 0;
    for (double n : operations) total += n;
    best = std::max(best, total / seconds / 1e9);
  }
  return best;
}

double measure_read_bandwidth(const KernelTable& table, int threads, size_t bytes) {
  constexpr size_t kPiece = size_t{4} << 20;
  const int64_t pieces = std::max<int64_t>(1, static_cast<int64_t>(bytes / kPiece));
  Buffer buffer(static_cast<size_t>(pieces) * kPiece);
  ThreadPool pool(threads);
  parallel_for(pool, pieces, [&](int64_t i, int) {
    std::fill_n(buffer.data() + i * kPiece, kPiece, static_cast<uint8_t>(i));
  });
  double best = 0;
  std::atomic<uint64_t> sink{0};
  for (int pass = 0; pass < 3; ++pass) {
    const auto start = Clock::now();
    parallel_for(pool, pieces,
                 [&](int64_t i, int) { sink += table.read(buffer.data() + i * kPiece, kPiece); });
    best = std::max(best, static_cast<double>(pieces) * kPiece / seconds_since(start) / 1e9);
  }
  return best;
}

}  // namespace ktcore
