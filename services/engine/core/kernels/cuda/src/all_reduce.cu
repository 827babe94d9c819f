// Sums over the cards of one machine, of messages so short that it is latency that counts.
//
// Each rank writes what it has into the inboxes of all ranks, in their memory, where there is a
// place for it from every one. Nobody says that something has been written: places are filled with
// a word that no message holds, so what else is in one has arrived (the protocol is known as "low
// latency" from NCCL and, with a word in place of flags, "Lamport" from TensorRT-LLM). One way over
// NVLink is thus all that a rank waits for: no fence, no flag behind it, no remote read.
//
// By one shot a rank reads what all ranks have of everything, and adds that up: ranks - 1 times the
// message crosses its link (of a token of 8 KB and 8 ranks 56 KB, 0.13 us of NVLink's 450 GB/s, so
// that it is the way there that takes the time). By two it adds up a part, and hands that round:
// twice the message, and two ways. Either way sums are in float32, in the order of ranks, so that
// all ranks get the same bits, and whichever shot they take.
//
// What was read is wiped again. That is done before anyone writes there next, since calls take
// turns with two slots: a rank that writes call n has ended n - 1, for which it had to read what
// each rank wrote after it had ended n - 2, wiping included. Wiping takes no fence either: it is in
// a card's own memory, whose L2 cache is where all that others write there comes as well, and it is
// through when the kernel ends, before the next one sends anything. Which slot it is, cards know
// from a count of their own, so that a captured graph can be launched again as it is. Kernels of a
// card that sum must run one after another, as they do on one stream.
#include <cstring>

#include "all_reduce.h"
#include "launch.h"
#include "numbers.h"

namespace meshserve {

// Two NaNs of 16 bits or one of 32, and what is sent in its place: NaNs again.
constexpr uint32_t kNothing = 0xffffffffu, kSentInstead = 0x7fffffffu;
// More than a grid has blocks; a call adds as much to the count.
constexpr uint32_t kCallUnits = 64;
constexpr int kMostThreads = 512;
// How often memory is looked at before the clock is.
constexpr uint32_t kLooks = 1024;
// What the host reads where patience has ended.
constexpr uint32_t kTimedOut = 2;

struct Fp32 {};

// Sixteen bytes of a type, as floats.
template <typename T>
struct Vector {
  static constexpr int size = 8;
  static __device__ __forceinline__ void unpack(const uint4& packed, float (&values)[8]) {
    unpack_8<T>(packed, values);
  }
  static __device__ __forceinline__ uint4 pack(const float (&values)[8]) {
    return pack_8<T>(values);
  }
};

template <>
struct Vector<Fp32> {
  static constexpr int size = 4;
  static __device__ __forceinline__ void unpack(const uint4& packed, float (&values)[4]) {
    values[0] = __uint_as_float(packed.x);
    values[1] = __uint_as_float(packed.y);
    values[2] = __uint_as_float(packed.z);
    values[3] = __uint_as_float(packed.w);
  }
  static __device__ __forceinline__ uint4 pack(const float (&values)[4]) {
    return {__float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]),
            __float_as_uint(values[3])};
  }
};

__device__ __forceinline__ uint32_t sendable(uint32_t word) {
  return word == kNothing ? kSentInstead : word;
}

__device__ __forceinline__ uint4 sendable(const uint4& words) {
  return {sendable(words.x), sendable(words.y), sendable(words.z), sendable(words.w)};
}

__device__ __forceinline__ bool has_arrived(const uint4& words) {
  return words.x != kNothing && words.y != kNothing && words.z != kNothing && words.w != kNothing;
}

// Of one thread: how long it has looked at memory that others are to write.
struct Patience {
  uint64_t since = 0;
  uint32_t looks = 0;

  // Whether there is nothing to wait for any more.
  __device__ __forceinline__ bool ends(const AllReduceArgs& args) {
    if (++looks % kLooks != 0) return false;
    if (load_4_system(args.status) != 0) return true;
    const uint64_t now = time_ns();
    if (since == 0) since = now;
    if (now - since <= uint64_t(args.patience_ns)) return false;
    store_4_system(args.status, kTimedOut);
    if (args.traps) trap();
    return true;
  }
};

// Waits for what `count` ranks send, `stride` vectors apart, and wipes their places. `most` of them
// are read at a time, all on their way at once. Returns false where they do not come.
template <int most>
__device__ __forceinline__ bool receive(uint4 (&found)[most], uint4* places, int count, int stride,
                                        const AllReduceArgs& args) {
  Patience patience;
  for (bool all = false; !all;) {
    all = true;
#pragma unroll
    for (int i = 0; i < most; ++i) {
      if (i < count) found[i] = load_16_system(places + i * stride);
    }
#pragma unroll
    for (int i = 0; i < most; ++i) {
      if (i < count) all = all && has_arrived(found[i]);
    }
    if (!all && patience.ends(args)) return false;
  }
#pragma unroll
  for (int i = 0; i < most; ++i) {
    if (i < count) {
      store_16_system(places + i * stride, {kNothing, kNothing, kNothing, kNothing});
    }
  }
  return true;
}

template <typename T>
__device__ __forceinline__ uint4 add_up(const uint4 (&parts)[kMostRanks], int ranks) {
  float sums[Vector<T>::size];
  Vector<T>::unpack(parts[0], sums);
#pragma unroll
  for (int i = 1; i < kMostRanks; ++i) {
    if (i >= ranks) continue;
    float part[Vector<T>::size];
    Vector<T>::unpack(parts[i], part);
#pragma unroll
    for (int j = 0; j < Vector<T>::size; ++j) sums[j] += part[j];
  }
  return Vector<T>::pack(sums);
}

// To the same place of all inboxes.
__device__ __forceinline__ void send_to_all(const uint4& words, int place,
                                            const AllReduceArgs& args) {
#pragma unroll
  for (int i = 0; i < kMostRanks; ++i) {
    if (i < args.ranks) store_16_system(args.inboxes[i] + place, words);
  }
}

// Where the slot of this call begins in every inbox. Takes part in counting calls: whoever comes
// late still finds the count of before, since it grows by a whole call only with all blocks.
__device__ __forceinline__ int begin_call(const AllReduceArgs& args) {
  const uint32_t call = __ldcg(args.calls) / kCallUnits;
  __syncthreads();
  if (threadIdx.x == 0) {
    atomicAdd(args.calls, blockIdx.x == 0 ? kCallUnits + 1 - gridDim.x : 1u);
  }
  return int(call % 2) * args.slot_vectors;
}

template <typename T>
__device__ __forceinline__ void sum_by_one_shot(const AllReduceArgs& args, int slot) {
  const int first = int(blockIdx.x * blockDim.x + threadIdx.x);
  const int step = int(gridDim.x * blockDim.x);
  for (int i = first; i < args.vectors; i += step) {
    send_to_all(sendable(args.values[i]), slot + args.rank * args.vectors + i, args);
  }
  uint4 parts[kMostRanks];
  for (int i = first; i < args.vectors; i += step) {
    if (!receive(parts, args.inboxes[0] + slot + i, args.ranks, args.vectors, args)) return;
    args.values[i] = add_up<T>(parts, args.ranks);
  }
}

template <typename T>
__device__ __forceinline__ void sum_by_two_shots(const AllReduceArgs& args, int slot) {
  const int first = int(blockIdx.x * blockDim.x + threadIdx.x);
  const int step = int(gridDim.x * blockDim.x);
  // Of each rank, the last of which may have less of it, or nothing.
  const int part = (args.vectors + args.ranks - 1) / args.ranks;
  const int own_begin = args.rank * part, sums = slot + args.ranks * part;
  for (int i = first; i < part; i += step) {
#pragma unroll
    for (int j = 0; j < kMostRanks; ++j) {
      if (j >= args.ranks) continue;
      const int to = args.rank + j < args.ranks ? args.rank + j : args.rank + j - args.ranks;
      const int at = to * part + i;
      if (at >= args.vectors) continue;
      store_16_system(args.inboxes[j] + slot + own_begin + i, sendable(args.values[at]));
    }
  }
  uint4 parts[kMostRanks];
  for (int i = first; i < part && own_begin + i < args.vectors; i += step) {
    if (!receive(parts, args.inboxes[0] + slot + i, args.ranks, part, args)) return;
    send_to_all(sendable(add_up<T>(parts, args.ranks)), sums + own_begin + i, args);
  }
  uint4 sum[1];
  for (int i = first; i < args.vectors; i += step) {
    if (!receive(sum, args.inboxes[0] + sums + i, 1, 0, args)) return;
    args.values[i] = sum[0];
  }
}

template <typename T, bool two_shot>
__global__ void __launch_bounds__(kMostThreads)
    all_reduce_kernel(const __grid_constant__ AllReduceArgs args) {
  grid_dependency_wait();
  grid_dependency_launch();
  const int slot = begin_call(args);
  if constexpr (two_shot) {
    sum_by_two_shots<T>(args, slot);
  } else {
    sum_by_one_shot<T>(args, slot);
  }
}

template <typename T>
int32_t run_all_reduce(const AllReduceArgs& args, cudaStream_t stream) {
  if (args.blocks > int32_t(kCallUnits) || args.threads > kMostThreads || args.ranks > kMostRanks) {
    return cudaErrorInvalidValue;
  }
  const Launch how{dim3(args.blocks), dim3(args.threads), 0, stream, true};
  return args.two_shot ? launch(all_reduce_kernel<T, true>, how, args)
                       : launch(all_reduce_kernel<T, false>, how, args);
}

MESHSERVE_EXPORT int32_t meshserve_all_reduce(const AllReduceArgs* args, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (args->format) {
    case Summand::bf16:
      return run_all_reduce<Bf16>(*args, on);
    case Summand::fp16:
      return run_all_reduce<Fp16>(*args, on);
    case Summand::fp32:
      return run_all_reduce<Fp32>(*args, on);
    default:
      return cudaErrorInvalidValue;
  }
}

// An inbox of one's own, with nothing in it, and a handle for other processes.
MESHSERVE_EXPORT int32_t meshserve_inbox_allocate(InboxArgs* args, void*) {
  cudaIpcMemHandle_t handle;
  static_assert(sizeof handle == sizeof args->handle);
  args->address = nullptr;
  cudaError_t error = cudaSetDevice(args->device);
  if (error == cudaSuccess) error = cudaMalloc(&args->address, size_t(args->bytes));
  if (error == cudaSuccess) error = cudaMemset(args->address, kNothing & 0xff, size_t(args->bytes));
  if (error == cudaSuccess) error = cudaDeviceSynchronize();
  if (error == cudaSuccess) error = cudaIpcGetMemHandle(&handle, args->address);
  if (error == cudaSuccess) memcpy(args->handle, &handle, sizeof handle);
  return error;
}

MESHSERVE_EXPORT int32_t meshserve_inbox_free(InboxArgs* args, void*) {
  const cudaError_t error = cudaSetDevice(args->device);
  return error == cudaSuccess ? cudaFree(args->address) : error;
}

// Another rank's, as this process sees it.
MESHSERVE_EXPORT int32_t meshserve_inbox_open(InboxArgs* args, void*) {
  cudaIpcMemHandle_t handle;
  memcpy(&handle, args->handle, sizeof handle);
  const cudaError_t error = cudaSetDevice(args->device);
  if (error != cudaSuccess) return error;
  return cudaIpcOpenMemHandle(&args->address, handle, cudaIpcMemLazyEnablePeerAccess);
}

MESHSERVE_EXPORT int32_t meshserve_inbox_close(InboxArgs* args, void*) {
  const cudaError_t error = cudaSetDevice(args->device);
  return error == cudaSuccess ? cudaIpcCloseMemHandle(args->address) : error;
}

}  // namespace meshserve
