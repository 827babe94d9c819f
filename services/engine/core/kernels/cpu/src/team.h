// The threads that compute a step together, and how they share its work.
//
// All threads run the same sequence of operations: within one they claim tasks until none is left,
// and a barrier ends it. Threads wait by spinning while a step runs, for a barrier is crossed every
// few microseconds; between steps they spin a little and then sleep.
#pragma once

#include <immintrin.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace meshserve {

// How far the tasks of one operation have been handed out.
class TaskCounter {
 public:
  void reset() { next_.store(0, std::memory_order_relaxed); }

  // Hands out the next of `count` tasks; false when none is left.
  bool take_one(int count, int& task) {
    task = next_.fetch_add(1, std::memory_order_relaxed);
    return task < count;
  }

 private:
  friend class TaskClaims;
  alignas(64) std::atomic<int> next_{0};
};

// The tasks [0, count) of one operation as one thread gets them, in shrinking ranges: long ones
// first, so that claiming costs little, and short ones last, so that all threads end together even
// where another process holds one of them up. The first range depends on the thread's rank alone.
class TaskClaims {
 public:
  TaskClaims(TaskCounter& counter, int count, int threads, int rank, int smallest)
      : counter_(counter), threads_(threads), smallest_(smallest) {
    const int share = first_share(count, threads);
    own_ = rank * share;
    own_end_ = own_ + share;
    shared_ = threads * share;
    shared_count_ = count - shared_;
  }

  static int first_share(int count, int threads) { return count / (2 * threads); }

  // The next range of this thread; false when none is left.
  bool next(int& begin, int& end) {
    if (own_ < own_end_) {
      begin = own_;
      end = own_ = own_end_;
      return true;
    }
    int first = counter_.next_.load(std::memory_order_relaxed), last;
    do {
      if (first >= shared_count_) return false;
      last = first + std::max((shared_count_ - first) / (2 * threads_), smallest_);
      last = std::min(last, shared_count_);
    } while (!counter_.next_.compare_exchange_weak(first, last, std::memory_order_relaxed));
    begin = shared_ + first;
    end = shared_ + last;
    return true;
  }

 private:
  TaskCounter& counter_;
  int threads_, smallest_;
  int own_, own_end_;          // the range that nobody else may claim
  int shared_, shared_count_;  // those that all may
};

class Team {
 public:
  // Starts `threads` - 1 threads beside the one that will call `run`. Where `processors` is given,
  // thread i of those started stays on processors[i]; where the caller stays is its own affair.
  Team(int threads, const int32_t* processors) : size_(threads) {
    for (int rank = 1; rank < threads; ++rank) {
      workers_.emplace_back([this, rank] { work(rank); });
      if (processors != nullptr) stay_on(processors[rank - 1], workers_.back());
    }
  }

  ~Team() {
    ending_ = true;
    start();
    for (std::thread& worker : workers_) worker.join();
  }

  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  // Runs `body(rank)` on every thread, the caller being rank 0, and returns when all are done.
  // One caller at a time.
  void run(const std::function<void(int)>& body) {
    body_ = &body;
    start();
    body(0);
    barrier();
  }

  // Waits until every thread has come here. What each wrote before, all can read afterwards.
  void barrier() {
    const uint32_t phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    await([&] { return phase_.load(std::memory_order_acquire) != phase; });
  }

  // Waits, within a step, for what another thread is about to do.
  template <typename Condition>
  void await(Condition holds) const {
    for (int turns = 0; !holds(); ++turns) {
      _mm_pause();
      // Whoever is awaited has lost its processor to another process: perhaps to ours.
      if (turns > patient_spins) sched_yield();
    }
  }

 private:
  static constexpr int patient_spins = 20'000;
  static constexpr int idle_spins = 4'000;  // about 50 us: the host's work between two steps

  // Where it cannot be had, the thread goes where the system sends it, as without.
  static void stay_on(int32_t processor, std::thread& thread) {
    if (processor < 0 || processor >= CPU_SETSIZE) return;
    cpu_set_t only;
    CPU_ZERO(&only);
    CPU_SET(static_cast<size_t>(processor), &only);
    pthread_setaffinity_np(thread.native_handle(), sizeof only, &only);
  }

  void start() {
    started_.fetch_add(1, std::memory_order_release);
    started_.notify_all();
  }

  void work(int rank) {
    for (uint32_t seen = 0;;) {
      for (int turns = 0; turns < idle_spins; ++turns) {
        if (started_.load(std::memory_order_acquire) != seen) break;
        _mm_pause();
      }
      started_.wait(seen, std::memory_order_acquire);
      seen = started_.load(std::memory_order_acquire);
      if (ending_) return;
      (*body_)(rank);
      barrier();
    }
  }

  const int size_;
  bool ending_ = false;
  const std::function<void(int)>* body_ = nullptr;
  std::vector<std::thread> workers_;
  alignas(64) std::atomic<uint32_t> started_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
};

}  // namespace meshserve
