// Persistent workers that share out numbered tasks.
//
// The caller works too, and never waits for a worker that has not started: it only waits for tasks
// that somebody is in the middle of. So a worker which the operating system keeps off the core
// (more threads than cores, a busy neighbour, a CPU quota) costs at most the task it holds.
// Each thread begins with a run of neighbouring tasks of its own and then takes from the others' runs:
// neighbours read neighbouring memory, and what is fetched ahead of one task is the next one's. With
// several NUMA nodes, neighbouring threads share one, whose CPUs the workers keep to, and take from each
// other first: tasks are in the order of the nodes whose memory they read.
// Idle workers spin for a few microseconds, because the next phase of the same operator usually
// follows at once, and then park in the kernel: an idle process uses no CPU time.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "common/buffer.h"

namespace ktcore {

class ThreadPool {
 public:
  using Task = void (*)(void* context, int64_t task, int thread);

  explicit ThreadPool(int threads);
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  ~ThreadPool();

  int size() const { return threads_; }

  // Calls task(context, i, thread) once for every i in [0, count), thread in [0, size()).
  // Only for the holder of lock(): one operator has the pool at a time.
  void run(int64_t count, Task task, void* context);

  std::mutex& lock() { return mutex_; }
  // Memory for the holder of lock(), kept between calls.
  Buffer& scratch() { return scratch_; }

 private:
  void worker(int thread);
  void work(int thread);
  void take(int owner, int thread);
  // Spins for a while, as long as no job but that one has opened.
  void linger(uint32_t seen) const;
  // The number of a thread's node among nodes_, and a node's first thread; of the one after the last, size().
  int node_of(int thread) const;
  int first_thread(int node) const { return threads_ * node / static_cast<int>(nodes_.size()); }

  const int threads_;
  const int spins_;
  const std::vector<int> nodes_;
  std::mutex mutex_;
  Buffer scratch_;

  // The tasks that are a thread's own, which it takes first and in order.
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  // What the current job is. Written only while no worker is inside.
  Task task_ = nullptr;
  void* context_ = nullptr;
  const std::unique_ptr<Share[]> shares_;

  alignas(64) std::atomic<uint32_t> epoch_{0};   // changes when a job opens or the pool stops
  alignas(64) std::atomic<uint32_t> inside_{0};  // workers that may touch the job's fields
  alignas(64) std::atomic<bool> open_{false};
  std::atomic<bool> stop_{false};
  std::atomic<int> parked_{0};
  std::atomic<bool> caller_parked_{false};
  std::atomic<int> alive_{0};
};

// The process-wide pool. A forked child gets a new one: its parent's threads did not follow.
// Shared, because another thread may change the pool's size while an operator runs on the old one.
std::shared_ptr<ThreadPool> default_pool();
void set_default_pool_size(int threads);
int default_pool_size();

// Runs f(task, thread) on the pool.
template <class F>
void parallel_for(ThreadPool& pool, int64_t count, F&& f) {
  pool.run(
      count, [](void* c, int64_t task, int thread) { (*static_cast<F*>(c))(task, thread); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace ktcore
