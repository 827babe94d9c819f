#include "emulator.h"

#include <sys/mman.h>
#include <unistd.h>

#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>

#include "cuda_runtime.h"

// Saves the registers that a callee must keep, and goes on where another fiber saved its own.
extern "C" void emulated_switch(void** saved, void* next);
asm(R"(
.text
.globl emulated_switch
.hidden emulated_switch
emulated_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");

emulated::Index threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulated {

Thread* self;
size_t bank_conflicts;

namespace {

constexpr size_t kStackBytes = 128 * 1024, kMaxThreads = 1024, kMaxShared = 227 * 1024;
constexpr size_t kSharedWithoutAsking = 48 * 1024, kBarriers = 16;
constexpr unsigned char kPoison = 0xff;  // NaN in every format of floats

std::mutex one_at_a_time;
std::map<const void*, size_t> allowed;
std::string message;
uint32_t schedule_seed;

// Memory whose end borders on a page that may not be touched.
struct Guarded {
  explicit Guarded(size_t bytes) : size(bytes) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    const size_t rounded = (bytes + page - 1) / page * page;
    auto* base = static_cast<unsigned char*>(
        mmap(nullptr, rounded + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(base + page, rounded, PROT_READ | PROT_WRITE);
    end = base + page + rounded;
  }
  size_t size;
  unsigned char* end;
};

Guarded& shared_area() {
  static Guarded area(kMaxShared + 1024);
  return area;
}
Guarded& stack_of(size_t thread) {
  static std::vector<std::unique_ptr<Guarded>> stacks(kMaxThreads);
  if (!stacks[thread]) stacks[thread] = std::make_unique<Guarded>(kStackBytes);
  return *stacks[thread];
}

struct Barrier {
  std::vector<Thread*> waiting;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barriers[kBarriers];
  size_t alive;
  bool any, any_before;
};

Block block;
unsigned char* shared_begin;
size_t shared_size;
const std::function<void()>* body;
void* scheduler;
sigjmp_buf failed;
int32_t error_code;

void yield() { emulated_switch(&self->stack_pointer, scheduler); }

void release(Barrier& barrier) {
  for (Thread* thread : barrier.waiting) thread->waits = false;
  barrier.waiting.clear();
}

void come_to(Barrier& barrier, size_t expected) {
  barrier.waiting.push_back(self);
  self->waits = true;
  if (barrier.waiting.size() >= expected) {
    release(barrier);
  } else {
    yield();
  }
}

void run_thread() {
  (*body)();
  self->ended = true;
  --block.alive;
  // Those at __syncthreads wait only for threads that are left.
  Barrier& all = block.barriers[0];
  if (block.alive > 0 && all.waiting.size() >= block.alive) {
    block.any_before = std::exchange(block.any, false);
    release(all);
  }
  yield();
}

void prepare(Thread& thread, size_t number) {
  auto* top = reinterpret_cast<void**>(stack_of(number).end);
  *--top = nullptr;  // where run_thread would return to; it does not
  *--top = reinterpret_cast<void*>(&run_thread);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  thread.stack_pointer = top;
}

void prepare_block() {
  const size_t count = size_t(blockDim.count());
  block.threads.assign(count, Thread{});
  block.warps.assign((count + 31) / 32, Warp{});
  for (Barrier& barrier : block.barriers) barrier.waiting.clear();
  block.alive = count;
  block.any = false;
  for (size_t i = 0; i < count; ++i) {
    Thread& thread = block.threads[i];
    const uint32_t x = blockDim.x, y = blockDim.y;
    thread.index = {uint32_t(i % x), uint32_t(i / x % y), uint32_t(i / x / y)};
    thread.lane = int(i % 32);
    thread.warp = &block.warps[i / 32];
    thread.warp->threads.push_back(&thread);
    prepare(thread, i);
  }
  memset(shared_area().end - shared_area().size, kPoison, shared_area().size);
}

bool run_warp(Warp& warp, bool backwards) {
  bool ran = false;
  const size_t count = warp.threads.size();
  for (size_t i = 0; i < count; ++i) {
    Thread* thread = warp.threads[backwards ? count - 1 - i : i];
    if (thread->waits || thread->ended) continue;
    self = thread;
    threadIdx = thread->index;
    emulated_switch(&scheduler, thread->stack_pointer);
    ran = true;
  }
  return ran;
}

// A warp goes on until it has to wait for others, or, where the schedule is random, for a while.
void run_block(std::mt19937& random) {
  prepare_block();
  std::vector<size_t> order(block.warps.size());
  std::iota(order.begin(), order.end(), 0);
  while (block.alive > 0) {
    bool ran = false;
    if (schedule_seed != 0) std::shuffle(order.begin(), order.end(), random);
    for (size_t warp : order) {
      uint32_t turns = schedule_seed == 0 ? ~0u : 1 + random() % 64;
      const bool backwards = schedule_seed != 0 && random() % 2 == 0;
      while (turns-- > 0 && run_warp(block.warps[warp], backwards)) ran = true;
    }
    if (!ran) fail(kLaunchTimeout, "threads wait for others that do not come");
  }
}

void on_signal(int, siginfo_t* info, void*) {
  static char text[80];
  std::snprintf(text, sizeof text, "an access to %p, outside of every allocation", info->si_addr);
  message = text;
  error_code = kIllegalAddress;
  siglongjmp(failed, 1);
}

// While a kernel runs, an access outside of memory is its failure and not this process's.
struct SignalHandler {
  SignalHandler() {
    static std::vector<unsigned char> alternate(64 * 1024);
    stack_t stack{};
    stack.ss_sp = alternate.data();
    stack.ss_size = alternate.size();
    sigaltstack(&stack, &stack_before);
    struct sigaction action{};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &before);
  }
  ~SignalHandler() {
    sigaction(SIGSEGV, &before, nullptr);
    sigaltstack(&stack_before, nullptr);
  }
  struct sigaction before;
  stack_t stack_before;
};

}  // namespace

void fail(int32_t error, const char* why) {
  message = why;
  error_code = error;
  siglongjmp(failed, 1);
}

void wait_for_block() {
  if (block.barriers[0].waiting.size() + 1 >= block.alive) {
    block.any_before = std::exchange(block.any, false);
  }
  come_to(block.barriers[0], block.alive);
}

bool any_of_block(bool mine) {
  block.any |= mine;
  wait_for_block();
  return block.any_before;
}

void wait_at(int barrier, int threads) { come_to(block.barriers[barrier], size_t(threads)); }

void meet(uint32_t mask, const char* what, void* mine, Act act, void* function) {
  Warp& warp = *self->warp;
  const uint32_t bit = 1u << self->lane;
  if (!(mask & bit)) fail(kLaunchFailure, "a lane calls for a mask that it is not in");
  if (warp.arrived == 0) {
    warp.what = what;
    warp.mask = mask;
  } else if (std::strcmp(warp.what, what) != 0 || warp.mask != mask) {
    fail(kLaunchFailure, "lanes of a warp are at different instructions");
  }
  warp.arrived |= bit;
  warp.brought[self->lane] = mine;
  if (warp.arrived != mask) {
    self->waits = true;
    yield();
    return;
  }
  act(warp.brought, mask, function);
  warp.arrived = 0;
  for (Thread* thread : warp.threads) {
    if (mask >> thread->lane & 1) thread->waits = false;
  }
}

unsigned char* shared_memory() { return shared_begin; }

void check_shared(const void* address, size_t bytes) {
  const auto* first = static_cast<const unsigned char*>(address);
  if (first < shared_begin || first + bytes > shared_begin + shared_size) {
    fail(kIllegalAddress, "an address is outside of the block's dynamic shared memory");
  }
}

void copy_later(void* shared, const void* global, size_t bytes, bool present) {
  check_shared(aligned(static_cast<unsigned char*>(shared), bytes), bytes);
  const auto* from = aligned(static_cast<const unsigned char*>(global), bytes);
  if (present) (void)*const_cast<const volatile unsigned char*>(from);
  memset(shared, kPoison, bytes);
  self->open.push_back({static_cast<unsigned char*>(shared), present ? from : nullptr, bytes});
}

void commit_copies() {
  self->groups.push_back(std::move(self->open));
  self->open.clear();
}

void wait_for_copies(size_t pending) {
  while (self->groups.size() > pending) {
    for (const Copy& copy : self->groups.front()) {
      if (copy.from != nullptr) {
        memcpy(copy.to, copy.from, copy.bytes);
      } else {
        memset(copy.to, 0, copy.bytes);
      }
    }
    self->groups.erase(self->groups.begin());
  }
}

int32_t allow_shared(const void* kernel, size_t bytes) {
  if (bytes > kMaxShared) return kInvalidValue;
  const std::lock_guard lock(one_at_a_time);
  allowed[kernel] = bytes;
  return 0;
}

int32_t run_grid(const void* kernel, Dimensions grid, Dimensions size, size_t shared_bytes,
                 const std::function<void()>& thread) {
  const std::lock_guard lock(one_at_a_time);
  const auto asked = allowed.find(kernel);
  const size_t limit = asked == allowed.end() ? kSharedWithoutAsking : asked->second;
  if (grid.count() == 0 || grid.y > 65535 || grid.z > 65535 || size.count() == 0 ||
      size.count() > kMaxThreads || shared_bytes > std::max(limit, kSharedWithoutAsking)) {
    return kInvalidConfiguration;
  }
  gridDim = grid;
  blockDim = size;
  body = &thread;
  shared_size = shared_bytes;
  shared_begin = shared_area().end - (shared_bytes + 127) / 128 * 128;
  std::vector<uint64_t> order(grid.count());
  std::iota(order.begin(), order.end(), 0);
  std::mt19937 random(schedule_seed);
  if (schedule_seed != 0) std::shuffle(order.begin(), order.end(), random);
  const SignalHandler handler;
  error_code = 0;
  if (sigsetjmp(failed, 1) == 0) {
    for (uint64_t each : order) {
      blockIdx = {uint32_t(each % grid.x), uint32_t(each / grid.x % grid.y),
                  uint32_t(each / grid.x / grid.y)};
      run_block(random);
    }
  }
  return error_code;
}

}  // namespace emulated

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorIllegalAddress:
      return "cudaErrorIllegalAddress";
    case cudaErrorLaunchTimeout:
      return "cudaErrorLaunchTimeout";
    case cudaErrorMisalignedAddress:
      return "cudaErrorMisalignedAddress";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
  }
  return "cudaErrorUnknown";
}

#define EXPORT extern "C" __attribute__((visibility("default")))

// 0: warps in their order, each as far as it gets; else another order for each seed.
EXPORT void emulator_schedule(uint32_t seed) { emulated::schedule_seed = seed; }

// What the last kernel that failed did wrong.
EXPORT const char* emulator_message() { return emulated::message.c_str(); }

// How many so far.
EXPORT uint64_t emulator_bank_conflicts() { return emulated::bank_conflicts; }
