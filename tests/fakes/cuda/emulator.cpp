#include "emulator.h"

#include <sys/mman.h>
#include <unistd.h>

#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <unordered_map>

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

struct Written {
  void* to;
  const void* from;
  size_t bytes;
};
static std::vector<Written> written_before;

namespace {

constexpr size_t kStackBytes = 128 * 1024, kMaxThreads = 1024, kMaxShared = 227 * 1024;
constexpr size_t kSharedWithoutAsking = 48 * 1024, kBarriers = 16;
constexpr const char* kNobodyComes = "threads wait for others that do not come";
constexpr unsigned char kPoison = 0xff;  // NaN in every format of floats

std::mutex one_at_a_time;
std::map<const void*, size_t> allowed;
std::string message;
uint32_t schedule_seed;
uint64_t pauses;

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
// Those that no fiber has.
std::vector<std::unique_ptr<Guarded>> free_stacks;

struct Barrier {
  std::vector<Thread*> waiting;
};

struct Grid {
  Dimensions size, block_size;
  std::function<void()> body;
};

struct Block {
  const Grid* grid;
  Index index;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<Guarded>> stacks;
  Barrier barriers[kBarriers];
  size_t alive = 0;
  bool any = false, any_before = false;

  Block(const Grid& of, uint64_t number);
  ~Block() {
    for (auto& stack : stacks) free_stacks.push_back(std::move(stack));
  }
};

// One of several, whose kernels run at the same time: one after another on each of them.
struct Device {
  std::deque<Grid> launched;
  std::vector<uint64_t> to_start;  // blocks of the first of them
  std::vector<std::unique_ptr<Block>> running;
  // Words on their way to memory: an address for each, and what is to come to an address in turn.
  std::vector<uint32_t*> stores;
  std::unordered_map<uint32_t*, std::vector<uint32_t>> words;
  bool is_within = false;  // the first of them
};

// The one that runs, and its device where there are several.
Block* block;
Device* device;
std::map<int32_t, Device> devices;
int32_t launches_on = -1;
unsigned char* shared_begin;
size_t shared_size;
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
  block->grid->body();
  self->ended = true;
  --block->alive;
  // Those at __syncthreads wait only for threads that are left.
  Barrier& all = block->barriers[0];
  if (block->alive > 0 && all.waiting.size() >= block->alive) {
    block->any_before = std::exchange(block->any, false);
    release(all);
  }
  yield();
}

void prepare(Thread& thread, Guarded& stack) {
  auto* top = reinterpret_cast<void**>(stack.end);
  *--top = nullptr;  // where run_thread would return to; it does not
  *--top = reinterpret_cast<void*>(&run_thread);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  thread.stack_pointer = top;
}

Block::Block(const Grid& of, uint64_t number) : grid(&of) {
  const Dimensions& all = of.size;
  index = {uint32_t(number % all.x), uint32_t(number / all.x % all.y),
           uint32_t(number / all.x / all.y)};
  const size_t count = size_t(of.block_size.count());
  threads.assign(count, Thread{});
  warps.assign((count + 31) / 32, Warp{});
  alive = count;
  for (size_t i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    const uint32_t x = of.block_size.x, y = of.block_size.y;
    thread.index = {uint32_t(i % x), uint32_t(i / x % y), uint32_t(i / x / y)};
    thread.lane = int(i % 32);
    thread.warp = &warps[i / 32];
    thread.warp->threads.push_back(&thread);
    if (free_stacks.empty()) free_stacks.push_back(std::make_unique<Guarded>(kStackBytes));
    stacks.push_back(std::move(free_stacks.back()));
    free_stacks.pop_back();
    prepare(thread, *stacks.back());
  }
}

void enter(Block& next) {
  block = &next;
  blockIdx = next.index;
  gridDim = next.grid->size;
  blockDim = next.grid->block_size;
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
void run_block(const Grid& grid, uint64_t number, std::mt19937& random) {
  Block own(grid, number);
  enter(own);
  memset(shared_area().end - shared_area().size, kPoison, shared_area().size);
  std::vector<size_t> order(own.warps.size());
  std::iota(order.begin(), order.end(), 0);
  while (own.alive > 0) {
    bool ran = false;
    if (schedule_seed != 0) std::shuffle(order.begin(), order.end(), random);
    for (size_t warp : order) {
      uint32_t turns = schedule_seed == 0 ? ~0u : 1 + random() % 64;
      const bool backwards = schedule_seed != 0 && random() % 2 == 0;
      while (turns-- > 0 && run_warp(own.warps[warp], backwards)) ran = true;
    }
    if (!ran) fail(kLaunchTimeout, kNobodyComes);
  }
}

// A word reaches memory, after what the device wrote to the same place before.
void land(Device& from, size_t which) {
  uint32_t* to = std::exchange(from.stores[which], from.stores.back());
  from.stores.pop_back();
  std::vector<uint32_t>& words = from.words[to];
  *to = words.front();
  words.erase(words.begin());
  if (words.empty()) from.words.erase(to);
}

// A turn of a device: a block starts, a warp goes on for a while, some of what was stored arrives.
// Returns whether anything was done.
bool run_turn(Device& turn, std::mt19937& random) {
  device = &turn;
  const bool in_order = schedule_seed == 0;
  if (!turn.is_within) {
    if (turn.launched.empty()) return false;
    turn.to_start.resize(turn.launched.front().size.count());
    std::iota(turn.to_start.begin(), turn.to_start.end(), 0);
    if (!in_order) std::shuffle(turn.to_start.begin(), turn.to_start.end(), random);
    turn.is_within = true;
  }
  while (!turn.to_start.empty() && (in_order || random() % 4 == 0)) {
    turn.running.push_back(std::make_unique<Block>(turn.launched.front(), turn.to_start.back()));
    turn.to_start.pop_back();
  }
  bool ran = false;
  const size_t first = random();
  for (size_t i = 0; i < turn.running.size() && !ran; ++i) {
    const size_t which = (first + i) % turn.running.size();
    Block& own = *turn.running[which];
    enter(own);
    std::vector<size_t> order(own.warps.size());
    std::iota(order.begin(), order.end(), 0);
    if (!in_order) std::shuffle(order.begin(), order.end(), random);
    for (size_t warp : order) {
      uint32_t turns = 1 + random() % 8;
      while (turns-- > 0 && run_warp(own.warps[warp], random() % 2 == 0)) ran = true;
    }
    if (own.alive == 0) {
      turn.running.erase(turn.running.begin() + ptrdiff_t(which));
      ran = true;
    }
  }
  ran |= !turn.stores.empty() || !turn.to_start.empty();
  size_t arriving = turn.stores.size();
  if (!in_order) arriving = random() % (arriving + 1) / (1 + random() % 4);
  while (arriving-- > 0) land(turn, random() % turn.stores.size());
  if (turn.running.empty() && turn.to_start.empty() && turn.stores.empty()) {
    // The next kernel sees all of it.
    turn.launched.pop_front();
    turn.is_within = false;
    ran = true;
  }
  return ran;
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

// Runs it; returns the error that ends it. What a block had goes with it where it ends early: that
// memory is lost, which a test can bear.
int32_t guarded_run(const std::function<void()>& run) {
  const SignalHandler handler;
  error_code = 0;
  if (sigsetjmp(failed, 1) == 0) run();
  return error_code;
}

}  // namespace

void fail(int32_t error, const char* why) {
  message = why;
  error_code = error;
  siglongjmp(failed, 1);
}

void wait_for_block() {
  if (block->barriers[0].waiting.size() + 1 >= block->alive) {
    block->any_before = std::exchange(block->any, false);
  }
  come_to(block->barriers[0], block->alive);
}

bool any_of_block(bool mine) {
  block->any |= mine;
  wait_for_block();
  return block->any_before;
}

void wait_at(int barrier, int threads) { come_to(block->barriers[barrier], size_t(threads)); }

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
  Copy copy{static_cast<unsigned char*>(shared), present ? from : nullptr, bytes, {}, false};
  if (present && !written_before.empty()) {
    copy.is_early = true;
    memcpy(copy.seen.data(), from, bytes);
  }
  self->open.push_back(copy);
}

void commit_copies() {
  self->groups.push_back(std::move(self->open));
  self->open.clear();
}

void wait_for_copies(size_t pending) {
  while (self->groups.size() > pending) {
    for (const Copy& copy : self->groups.front()) {
      if (copy.from != nullptr) {
        memcpy(copy.to, copy.is_early ? copy.seen.data() : copy.from, copy.bytes);
      } else {
        memset(copy.to, 0, copy.bytes);
      }
    }
    self->groups.erase(self->groups.begin());
  }
}

void end_earlier() {
  if (written_before.empty()) return;
  yield();  // others come as far as this, too
  for (const Written& each : written_before) memcpy(each.to, each.from, each.bytes);
  written_before.clear();
}

int32_t allow_shared(const void* kernel, size_t bytes) {
  if (bytes > kMaxShared) return kInvalidValue;
  const std::lock_guard lock(one_at_a_time);
  allowed[kernel] = bytes;
  return 0;
}

void pause() {
  ++pauses;
  yield();
}

uint64_t time_ns() { return pauses * kPauseNs; }

void store_later(uint32_t* address, uint32_t word) {
  if (device == nullptr) {
    *address = word;
  } else {
    device->stores.push_back(address);
    device->words[address].push_back(word);
  }
}

int32_t run_grid(const void* kernel, Dimensions grid, Dimensions size, size_t shared_bytes,
                 std::function<void()> thread) {
  const std::lock_guard lock(one_at_a_time);
  const auto asked = allowed.find(kernel);
  const size_t limit = asked == allowed.end() ? kSharedWithoutAsking : asked->second;
  if (grid.count() == 0 || grid.y > 65535 || grid.z > 65535 || size.count() == 0 ||
      size.count() > kMaxThreads || shared_bytes > std::max(limit, kSharedWithoutAsking)) {
    return kInvalidConfiguration;
  }
  Grid launched{grid, size, std::move(thread)};
  if (launches_on >= 0) {
    if (shared_bytes > 0) return kInvalidConfiguration;  // there is but one area
    devices[launches_on].launched.push_back(std::move(launched));
    return 0;
  }
  shared_size = shared_bytes;
  shared_begin = shared_area().end - (shared_bytes + 127) / 128 * 128;
  std::vector<uint64_t> order(grid.count());
  std::iota(order.begin(), order.end(), 0);
  std::mt19937 random(schedule_seed);
  if (schedule_seed != 0) std::shuffle(order.begin(), order.end(), random);
  return guarded_run([&] {
    for (uint64_t each : order) run_block(launched, each, random);
  });
}

int32_t run_devices() {
  const std::lock_guard lock(one_at_a_time);
  std::mt19937 random(schedule_seed);
  std::vector<Device*> order;
  for (auto& [number, each] : devices) order.push_back(&each);
  const int32_t error = guarded_run([&] {
    for (bool ran = true; ran;) {
      ran = false;
      // One may have many turns while another has none.
      if (schedule_seed != 0) std::shuffle(order.begin(), order.end(), random);
      for (Device* each : order) {
        uint32_t turns = schedule_seed == 0 ? 1 : 1 + random() % 16;
        while (turns-- > 0 && run_turn(*each, random)) ran = true;
      }
    }
    for (Device* each : order) {
      if (!each->launched.empty()) fail(kLaunchTimeout, kNobodyComes);
    }
  });
  device = nullptr;
  devices.clear();
  return error;
}

}  // namespace emulated

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
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

// Kernels are launched on one of several devices, where they wait for emulator_run_devices; -1:
// they run at once.
EXPORT void emulator_device(int32_t device) { emulated::launches_on = device; }

// Runs what was launched on all devices, their blocks and stores in any order that a seed gives.
EXPORT int32_t emulator_run_devices() { return emulated::run_devices(); }

// Bytes that the kernel before the next one writes: they are there when that waits for it.
EXPORT void emulator_written_before(void* to, const void* from, uint64_t bytes) {
  emulated::written_before.push_back({to, from, bytes});
}

// What the last kernel that failed did wrong.
EXPORT const char* emulator_message() { return emulated::message.c_str(); }

// How many so far.
EXPORT uint64_t emulator_bank_conflicts() { return emulated::bank_conflicts; }
