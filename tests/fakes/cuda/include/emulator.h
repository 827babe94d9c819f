// Runs the threads of a kernel's blocks on a CPU: one fiber a thread, one block after another, or,
// of kernels that several devices run at the same time, all in turns.
//
// What a card would let pass and compute wrongly is made visible. Shared memory is filled with NaN
// before a block runs; a destination of cp.async is, until its group has been waited for; threads
// take turns in an order that `emulator_schedule` changes; an access outside of an allocation that
// ends at a page which may not be touched ends the kernel with the error that a card reports.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace emulated {

// As CUDA numbers them.
inline constexpr int32_t kInvalidValue = 1, kInvalidConfiguration = 9, kIllegalAddress = 700,
                         kLaunchTimeout = 702, kMisalignedAddress = 716, kLaunchFailure = 719;

struct Index {
  uint32_t x, y, z;
};

struct Dimensions {
  uint32_t x, y, z;
  Dimensions(uint32_t x_size = 1, uint32_t y_size = 1, uint32_t z_size = 1)
      : x(x_size), y(y_size), z(z_size) {}
  uint64_t count() const { return uint64_t(x) * y * z; }
};

struct Copy {
  unsigned char* to;
  const unsigned char* from;  // null: zeros
  size_t bytes;
  // Where an earlier kernel has not ended, what it saw: a copy may read as soon as it begins.
  std::array<unsigned char, 16> seen;
  bool is_early;
};

struct Warp;

struct Thread {
  Index index;
  int lane;
  Warp* warp;
  bool waits, ended;
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
  void* stack_pointer;
};

struct Warp {
  std::vector<Thread*> threads;
  // A meeting of lanes: what it is for, who takes part, who has come with what.
  const char* what;
  uint32_t mask, arrived;
  void* brought[32];
};

// The one that runs.
extern Thread* self;

// Rows of matrices that ldmatrix had to load after others, because they lie in the same banks.
extern size_t bank_conflicts;

// What an earlier kernel writes, which has not ended before it is waited for.
void end_earlier();

// Ends the kernel: its launch returns `error`, and emulator_message() says `why`.
[[noreturn]] void fail(int32_t error, const char* why);

// __syncthreads: until all threads of the block that have not ended are here.
void wait_for_block();
bool any_of_block(bool mine);
// bar.sync: until `threads` of them are at this one of the 16 barriers.
void wait_at(int barrier, int threads);

using Act = void (*)(void* const* lanes, uint32_t mask, void* function);
void meet(uint32_t mask, const char* what, void* mine, Act act, void* function);

// Has the lanes of `mask` meet; the last to come calls act(T* const* by_lane, mask) for all.
template <typename T, typename Function>
void together(uint32_t mask, const char* what, T& mine, Function act) {
  meet(
      mask, what, &mine,
      [](void* const* lanes, uint32_t present, void* function) {
        T* typed[32];
        for (int lane = 0; lane < 32; ++lane) typed[lane] = static_cast<T*>(lanes[lane]);
        (*static_cast<Function*>(function))(typed, present);
      },
      &act);
}

// The address, which must be a multiple of what it points to (of `bytes`).
template <typename T>
T* aligned(T* address, size_t bytes = sizeof(T)) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    fail(kMisalignedAddress, "an address is no multiple of the size of the access");
  }
  return address;
}

unsigned char* shared_memory();
// Ends the kernel unless `bytes` from `address` on are within the block's dynamic shared memory.
void check_shared(const void* address, size_t bytes);

void copy_later(void* shared, const void* global, size_t bytes, bool present);
void commit_copies();
void wait_for_copies(size_t pending);

int32_t allow_shared(const void* kernel, size_t bytes);
int32_t run_grid(const void* kernel, Dimensions grid, Dimensions block, size_t shared_bytes,
                 std::function<void()> thread);
// Runs the kernels that were launched on several devices, all at the same time.
int32_t run_devices();

// Lets others take their turn, as whoever looks at memory again and again must.
void pause();
// Time goes by with pauses.
inline constexpr uint64_t kPauseNs = 1000;
uint64_t time_ns();
// The word reaches memory at some time before the kernel ends, on several devices; at once on one.
void store_later(uint32_t* address, uint32_t word);

}  // namespace emulated
