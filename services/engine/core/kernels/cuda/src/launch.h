// Starting a kernel, and what every entry of the library returns.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#define MESHSERVE_EXPORT extern "C" __attribute__((visibility("default")))

namespace meshserve {

struct Launch {
  dim3 grid;
  dim3 block;
  size_t smem_bytes = 0;
  cudaStream_t stream = nullptr;
  // Start while the kernel before still runs, where the card can (sm_90): the kernel must call
  // grid_dependency_wait before it reads what another one wrote, or writes at all.
  bool programmatic = false;
};

// Whether the current device starts kernels before the one before has ended.
inline bool launches_early() {
  // Of every device of a machine this asks once: the answer takes part in each launch.
  static int8_t known[64] = {};
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= 64) return false;
  if (known[device] == 0) {
    int major = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    known[device] = major >= 9 ? 1 : -1;
  }
  return known[device] > 0;
}

// Returns what went wrong with starting it; what goes wrong while it runs is seen later.
template <typename... Formal, typename... Actual>
int32_t launch(void (*kernel)(Formal...), const Launch& how, Actual&&... arguments) {
  constexpr size_t without_asking = 48 * 1024;
  if (how.smem_bytes > without_asking) {
    const cudaError_t refused =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, int(how.smem_bytes));
    if (refused != cudaSuccess) return refused;
  }
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid;
  config.blockDim = how.block;
  config.dynamicSmemBytes = how.smem_bytes;
  config.stream = how.stream;
  config.attrs = &early;
  config.numAttrs = how.programmatic && launches_early() ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Formal>(arguments)...);
}

}  // namespace meshserve
