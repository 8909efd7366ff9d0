#include "common/thread_pool.h"

#include <chrono>
#include <thread>
#include <utility>

#include "common/futex.h"
#include "common/numa.h"
#include "common/platform.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace ktcore {
namespace {

int available_cpus() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  const int n = static_cast<int>(std::thread::hardware_concurrency());
  return n > 0 ? n : 1;
}

// How often the caller looks whether the workers are done before it parks: for some tens of microseconds.
constexpr int kSpins = 1000;
// How long a worker looks for the next job before it parks: waking it takes the caller some 20 microseconds, and as
// many again pass until it runs. Longer than what Python takes between two operators beside weights that
// stream through the caches. It gives the core to whoever else wants it meanwhile.
constexpr std::chrono::microseconds kLinger{100};
constexpr int kSpinsBetweenLooks = 20;

}  // namespace

ThreadPool::ThreadPool(int threads)
    : threads_(threads < 1 ? 1 : threads),
      // With more threads than cores a spinning thread holds the core that the work needs.
      spins_(threads <= available_cpus() ? kSpins : 0),
      nodes_([&] {
        auto nodes = memory_nodes();
        return nodes.empty() ? std::vector<int>{-1} : std::move(nodes);
      }()),
      shares_(new Share[static_cast<size_t>(threads_)]) {
  for (int i = 1; i < threads_; ++i) {
    alive_.fetch_add(1);
    std::thread([this, i] { worker(i); }).detach();
  }
}

ThreadPool::~ThreadPool() {
  stop_.store(true);
  epoch_.fetch_add(1);
  futex_wake_all(epoch_);
  while (alive_.load() != 0) std::this_thread::yield();
}

int ThreadPool::node_of(int thread) const {
  int node = 0;
  while (first_thread(node + 1) <= thread) ++node;
  return node;
}

// Runs what is left of a thread's share.
void ThreadPool::take(int owner, int thread) {
  Share& share = shares_[owner];
  for (;;) {
    const int64_t i = share.next.fetch_add(1, std::memory_order_relaxed);
    if (i >= share.end) break;
    task_(context_, i, thread);
  }
}

void ThreadPool::work(int thread) {
  const int node = node_of(thread);
  const int first = first_thread(node), count = first_thread(node + 1) - first;
  for (int k = 0; k < count; ++k) take(first + (thread - first + k) % count, thread);
  for (int k = count; k < threads_; ++k) take((first + k) % threads_, thread);
}

void ThreadPool::run(int64_t count, Task task, void* context) {
  if (count <= 0) return;
  if (threads_ == 1 || count == 1) {
    for (int64_t i = 0; i < count; ++i) task(context, i, 0);
    return;
  }
  task_ = task;
  context_ = context;
  for (int t = 0; t < threads_; ++t) {
    shares_[t].next.store(count * t / threads_, std::memory_order_relaxed);
    shares_[t].end = count * (t + 1) / threads_;
  }
  open_.store(true);
  epoch_.fetch_add(1);
  if (parked_.load() > 0) futex_wake_all(epoch_);

  work(0);

  // Closing and entering are sequentially consistent: either a late worker sees the job closed, or
  // we see it inside.
  open_.store(false);
  for (int spin = 0; inside_.load() != 0; ++spin) {
    if (spin < spins_) {
      cpu_relax();
      continue;
    }
    caller_parked_.store(true);
    const uint32_t now = inside_.load();
    if (now != 0) futex_wait(inside_, now);
    caller_parked_.store(false);
  }
}

void ThreadPool::linger(uint32_t seen) const {
  const auto end = std::chrono::steady_clock::now() + kLinger;
  do {
    for (int spin = 0; spin < kSpinsBetweenLooks; ++spin) {
      if (epoch_.load(std::memory_order_acquire) != seen) return;
      cpu_relax();
    }
    std::this_thread::yield();
  } while (std::chrono::steady_clock::now() < end);
}

void ThreadPool::worker(int thread) {
  if (nodes_.size() > 1) stay_on_node(nodes_[static_cast<size_t>(node_of(thread))]);
  uint32_t seen = 0;
  for (;;) {
    if (spins_ > 0) linger(seen);
    while (epoch_.load() == seen) {
      parked_.fetch_add(1);
      if (epoch_.load() == seen) futex_wait(epoch_, seen);
      parked_.fetch_sub(1);
    }
    seen = epoch_.load();
    if (stop_.load()) break;
    inside_.fetch_add(1);
    if (open_.load()) work(thread);
    if (inside_.fetch_sub(1) == 1 && caller_parked_.load()) futex_wake_all(inside_);
  }
  alive_.fetch_sub(1);
}

namespace {

struct Default {
  std::mutex mutex;
  std::shared_ptr<ThreadPool> pool;
  int size = 0;  // 0: as many as the process may use
};
// Leaked on purpose: at process exit the workers may be gone before destructors run.
Default* g_default = new Default;

#if defined(__linux__)
const int g_registered = pthread_atfork(nullptr, nullptr, [] {
  // Its lock may have been held by, and its workers were, threads that do not exist in the child.
  const int size = g_default->size;
  g_default = new Default;
  g_default->size = size;
});
#endif

int wanted_size() { return g_default->size > 0 ? g_default->size : available_cpus(); }

}  // namespace

std::shared_ptr<ThreadPool> default_pool() {
  std::lock_guard<std::mutex> guard(g_default->mutex);
  if (!g_default->pool) g_default->pool = std::make_shared<ThreadPool>(wanted_size());
  return g_default->pool;
}

void set_default_pool_size(int threads) {
  std::shared_ptr<ThreadPool> old;  // destroyed after the lock is released, by its last user
  std::lock_guard<std::mutex> guard(g_default->mutex);
  g_default->size = threads;
  if (g_default->pool && g_default->pool->size() != wanted_size()) old = std::move(g_default->pool);
}

int default_pool_size() {
  std::lock_guard<std::mutex> guard(g_default->mutex);
  return g_default->pool ? g_default->pool->size() : wanted_size();
}

}  // namespace ktcore
