// Stands in for CUDA's header of that name where kernels are compiled by g++ for the emulator.
//
// Only what the kernels use is here. What a name means is said in the CUDA C++ Programming Guide.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <utility>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
// The blocks of a grid run one after another. Dynamic shared memory is poisoned before each of
// them, what this declares is not.
#define __shared__ static
#define __constant__ static const
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int32_t x, y;
};
struct alignas(16) int4 {
  int32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int32_t x, int32_t y) { return {x, y}; }
inline int4 make_int4(int32_t x, int32_t y, int32_t z, int32_t w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

using dim3 = emulated::Dimensions;
extern emulated::Index threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

using std::max;
using std::min;

inline uint32_t __float_as_uint(float value) { return std::bit_cast<uint32_t>(value); }
inline int32_t __float_as_int(float value) { return std::bit_cast<int32_t>(value); }
inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline float __int_as_float(int32_t bits) { return std::bit_cast<float>(bits); }
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline float __expf(float value) { return std::exp(value); }
inline float __logf(float value) { return std::log(value); }
inline float __log2f(float value) { return std::log2(value); }
inline float __fdividef(float a, float b) { return a / b; }
inline int __popc(uint32_t bits) { return std::popcount(bits); }
inline int __clz(int bits) { return std::countl_zero(uint32_t(bits)); }
inline int __ffs(int bits) { return bits == 0 ? 0 : std::countr_zero(uint32_t(bits)) + 1; }

inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t(high) << 32 | low;
  uint32_t chosen = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t pick = selector >> 4 * i & 0xf;
    uint32_t byte = uint32_t(bytes >> 8 * (pick & 7)) & 0xff;
    if (pick & 8) byte = byte & 0x80 ? 0xff : 0;
    chosen |= byte << 8 * i;
  }
  return chosen;
}

inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 4; ++i) sum += int8_t(a >> 8 * i) * int8_t(b >> 8 * i);
  return sum;
}

template <typename T>
T __ldg(const T* address) {
  return *emulated::aligned(address);
}
template <typename T>
T __ldcg(const T* address) {
  return *emulated::aligned(address);
}
template <typename T>
T __ldcs(const T* address) {
  return *emulated::aligned(address);
}
template <typename T>
void __stcg(T* address, T value) {
  *emulated::aligned(address) = value;
}
template <typename T>
void __stcs(T* address, T value) {
  *emulated::aligned(address) = value;
}

inline void __syncthreads() { emulated::wait_for_block(); }
inline int __syncthreads_or(int predicate) { return emulated::any_of_block(predicate != 0); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __syncwarp(uint32_t mask = 0xffffffffu) {
  int nothing = 0;
  emulated::together(mask, "__syncwarp", nothing, [](int* const*, uint32_t) {});
}

namespace emulated {

template <typename T>
struct Exchange {
  T mine, received;
  int from;
};

template <typename T>
T exchange(uint32_t mask, T value, int from, const char* what) {
  Exchange<T> own{value, value, from};
  together(mask, what, own, [](Exchange<T>* const* lanes, uint32_t present) {
    for (int lane = 0; lane < 32; ++lane) {
      if (!(present >> lane & 1)) continue;
      const int source = lanes[lane]->from;
      if (!(present >> source & 1)) fail(kLaunchFailure, "a shuffle from a lane outside its mask");
      lanes[lane]->received = lanes[source]->mine;
    }
  });
  return own.received;
}

inline uint32_t vote(uint32_t mask, bool predicate) {
  struct Ballot {
    bool mine;
    uint32_t all;
  } own{predicate, 0};
  together(mask, "vote", own, [](Ballot* const* lanes, uint32_t present) {
    uint32_t all = 0;
    for (int lane = 0; lane < 32; ++lane) {
      if (present >> lane & 1) all |= uint32_t(lanes[lane]->mine) << lane;
    }
    for (int lane = 0; lane < 32; ++lane) {
      if (present >> lane & 1) lanes[lane]->all = all;
    }
  });
  return own.all;
}

}  // namespace emulated

// Of each `width` lanes that follow one another; a source outside of them gives one's own value.
template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32) {
  const int first = emulated::self->lane & ~(width - 1);
  return emulated::exchange(mask, value, first | (source & (width - 1)), "__shfl_sync");
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32) {
  const int lane = emulated::self->lane, source = lane ^ bits;
  const bool within = source < (lane & ~(width - 1)) + width;
  return emulated::exchange(mask, value, within ? source : lane, "__shfl_xor_sync");
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned distance, int width = 32) {
  const int lane = emulated::self->lane;
  const bool within = (lane & (width - 1)) + int(distance) < width;
  return emulated::exchange(mask, value, within ? lane + int(distance) : lane, "__shfl_down_sync");
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned distance, int width = 32) {
  const int lane = emulated::self->lane;
  const bool within = (lane & (width - 1)) - int(distance) >= 0;
  return emulated::exchange(mask, value, within ? lane - int(distance) : lane, "__shfl_up_sync");
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
  return emulated::vote(mask, predicate != 0);
}
inline int __any_sync(uint32_t mask, int predicate) {
  return emulated::vote(mask, predicate != 0) != 0;
}
inline int __all_sync(uint32_t mask, int predicate) {
  return emulated::vote(mask, predicate != 0) == mask;
}

// One thread runs at a time, so that a plain operation is an atomic one.
template <typename T>
T atomicAdd(T* address, T value) {
  return std::exchange(*emulated::aligned(address), *address + value);
}
template <typename T>
T atomicMax(T* address, T value) {
  return std::exchange(*emulated::aligned(address), std::max(*address, value));
}
template <typename T>
T atomicExch(T* address, T value) {
  return std::exchange(*emulated::aligned(address), value);
}
template <typename T>
T atomicCAS(T* address, T expected, T value) {
  return std::exchange(*emulated::aligned(address), *address == expected ? value : *address);
}
inline uint32_t atomicInc(uint32_t* address, uint32_t last) {
  return std::exchange(*emulated::aligned(address), *address >= last ? 0 : *address + 1);
}

enum cudaError_t : int32_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = emulated::kInvalidValue,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = emulated::kInvalidConfiguration,
  cudaErrorIllegalAddress = emulated::kIllegalAddress,
  cudaErrorLaunchTimeout = emulated::kLaunchTimeout,
  cudaErrorMisalignedAddress = emulated::kMisalignedAddress,
  cudaErrorLaunchFailure = emulated::kLaunchFailure,
  cudaErrorNotSupported = 801,
};
const char* cudaGetErrorName(cudaError_t error);

// The emulated card is one H100.
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
};
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount      ? 132
           : attribute == cudaDevAttrComputeCapabilityMajor ? 9
                                                            : 0;
  return cudaSuccess;
}

// Of all processes there is one: memory is where its handle says.
struct cudaIpcMemHandle_t {
  void* address;
  char reserved[64 - sizeof(void*)];
};
enum { cudaIpcMemLazyEnablePeerAccess = 1 };
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaMalloc(void** address, size_t bytes) {
  *address = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return *address == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
inline cudaError_t cudaFree(void* address) {
  std::free(address);
  return cudaSuccess;
}
inline cudaError_t cudaMemset(void* address, int value, size_t bytes) {
  std::memset(address, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* address) {
  *handle = {address, {}};
  return cudaSuccess;
}
inline cudaError_t cudaIpcOpenMemHandle(void** address, cudaIpcMemHandle_t handle, unsigned) {
  *address = handle.address;
  return handle.address == nullptr ? cudaErrorInvalidValue : cudaSuccess;
}
inline cudaError_t cudaIpcCloseMemHandle(void*) { return cudaSuccess; }

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  return static_cast<cudaError_t>(emulated::allow_shared(kernel, size_t(bytes)));
}

using cudaStream_t = struct CUstream_st*;
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
union cudaLaunchAttributeValue {
  int programmaticStreamSerializationAllowed;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

template <typename... Formal, typename... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Formal...),
                               Actual&&... arguments) {
  const std::tuple<Formal...> values(std::forward<Actual>(arguments)...);
  return static_cast<cudaError_t>(
      emulated::run_grid(reinterpret_cast<const void*>(kernel), config->gridDim, config->blockDim,
                         config->dynamicSmemBytes, [=] { std::apply(kernel, values); }));
}
