// What the host passes for a sum over ranks, and what the memory that ranks share is.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace meshserve {

inline constexpr int kMostRanks = 8;

// As kernels/cuda/all_reduce.py numbers them.
enum class Summand : int32_t { bf16 = 0, fp16 = 1, fp32 = 2 };

struct AllReduceArgs {
  uint4* values;               // [vectors]: what this rank has of the sum; the sum is written there
  uint4* inboxes[kMostRanks];  // of this rank, of the next, ... of the one before: two slots each
  uint32_t* calls;             // of this card: what tells one slot from the other
  uint32_t* status;            // in the host's memory: not zero where there is nothing to wait for
  int64_t patience_ns;         // how long other ranks are waited for
  int32_t vectors;             // of 16 bytes
  int32_t slot_vectors;        // of each slot
  int32_t ranks;
  int32_t rank;
  int32_t blocks;
  int32_t threads;
  int32_t two_shot;  // whether each rank adds up a part, and hands it round
  int32_t traps;     // whether to end the process where patience does
  Summand format;
};

// Memory of a card that processes of other cards can open.
struct InboxArgs {
  int32_t device;
  int32_t bytes;
  unsigned char handle[64];
  void* address;
};

}  // namespace meshserve
