// Threads contend for the pool, for ThreadSanitizer to watch: `ktcore_stress [rounds]`. Every sum is
// checked, too. Built with -DKTCORE_STRESS=ON; run by ci/sanitize.py.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "common/engine.h"
#include "common/isa.h"
#include "common/numa.h"
#include "common/thread_pool.h"

using namespace ktcore;

namespace {

std::atomic<int> g_failures{0};

void expect(bool good, const char* what) {
  if (good) return;
  g_failures.fetch_add(1);
  std::fprintf(stderr, "wrong: %s\n", what);
}

// Every task once, what each wrote seen by the caller; with more threads than cores, and on nodes, too.
void pool_of_its_own(int rounds, const std::vector<int>& nodes) {
  set_memory_nodes(nodes);
  for (int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    std::vector<int64_t> out(97);
    for (int round = 0; round < rounds; ++round) {
      const int64_t count = 1 + round % static_cast<int>(out.size());
      parallel_for(pool, count, [&](int64_t i, int thread) {
        if (thread < 0 || thread >= threads) g_failures.fetch_add(1);
        out[i] += i + round;
      });
      for (int64_t i = 0; i < count; ++i) {
        expect(out[i] == i + round, "a task ran not once, or its result was not seen");
        out[i] = 0;
      }
    }
  }
}

// Operators from several threads on the pool that all share, while another changes its size.
void shared_pool(const KernelTable& table, int rounds) {
  constexpr int64_t kRows = 96, kCols = 64, kTokens = 5;
  WeightLayout layout;
  layout.format = WeightFormat::bf16;
  const std::vector<uint16_t> ones(kRows * kCols, 0x3f80);
  PackedMatrix weight(layout, kRows, kCols);
  StoredMatrix stored{};
  stored.data = ones.data();
  weight.pack(stored);
  std::atomic<bool> done{false};
  std::thread resizing([&] {
    for (int size = 1; !done.load(); size = size % 4 + 1) {
      set_default_pool_size(size);
      std::this_thread::yield();
    }
  });
  std::vector<std::thread> callers;
  for (int caller = 1; caller <= 3; ++caller) {
    callers.emplace_back([&, caller] {
      const std::vector<float> x(kTokens * kCols, static_cast<float>(caller));
      for (int round = 0; round < rounds; ++round) {
        std::vector<float> out(kTokens * kRows, -1.0f);
        linear(table, LinearArgs{&weight,
                                 {x.data(), kCols, DType::f32},
                                 {out.data(), kRows, DType::f32},
                                 kTokens,
                                 nullptr,
                                 false});
        bool good = true;
        for (float value : out) good &= value == static_cast<float>(caller * kCols);
        expect(good, "linear, called from several threads");
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  done.store(true);
  resizing.join();
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 300;
  for (const auto& nodes : {std::vector<int>{}, {-1, -1}, {0, 0, -1}}) {
    pool_of_its_own(10 * rounds, nodes);
  }
  int tables = 0;
  for (const Isa& isa : isas()) {
    if (!isa.missing().empty()) continue;
    shared_pool(*isa.table, rounds);
    std::printf("%s: done\n", isa.name);
    ++tables;
  }
  std::printf("%d instruction sets, %d failures\n", tables, g_failures.load());
  return g_failures.load() == 0 ? 0 : 1;
}
