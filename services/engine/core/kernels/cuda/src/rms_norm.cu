// Root-mean-square normalisation of rows, and the residual addition before it.
//
// One block a row, which it reads once and keeps in registers: 8 elements (16 bytes) a thread and
// vector. A step of one token has one row of some 8 KB: there it is latency that counts, of the
// launch above all, so the kernel is launched early and fetches its weights, which nobody writes,
// before it waits for the row.
//
// It lets the next kernel begin before it waits, not behind: where this one has a row, 131 of 132
// multiprocessors have nothing to do for the 2 us of two loads, a sum and a store. The next is a
// product, whose blocks come as those of the last product leave, and have up to 96 KB of weights on
// their way to each multiprocessor, which is 4 us of the memory, before the row is there. So a
// product that normalised its input itself would gain next to nothing, and a residual that is added
// in the product before would spare one row of reading and no launch.
#include "launch.h"
#include "numbers.h"
#include "reductions.h"

namespace meshserve {

constexpr int kVector = 8;
constexpr int kMaxThreads = 1024;

struct RmsNormArgs {
  const void* hidden;  // [rows, size], rows hidden_stride elements apart
  const void* before;  // [size] or null: the weight of a norm that hidden goes through first
  void* residual;      // [rows, size] or null; the sum is written here
  const void* weight;  // [size]
  void* output;        // [rows, size]
  int64_t hidden_stride;
  int32_t rows;
  int32_t size;  // a multiple of 8
  float eps;
  Format format;
};

__device__ __forceinline__ float sum_of_squares(const float (&values)[kVector]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kVector; ++i) sum += values[i] * values[i];
  return sum;
}

template <typename T>
__device__ __forceinline__ void multiply(float (&values)[kVector], float scale,
                                         const uint4& weights) {
  float factors[kVector];
  unpack_8<T>(weights, factors);
#pragma unroll
  for (int i = 0; i < kVector; ++i) values[i] *= scale * factors[i];
}

template <typename T, int vectors, bool is_twice>
__global__ void __launch_bounds__(kMaxThreads) rms_norm_kernel(const RmsNormArgs args) {
  float* scratch = reinterpret_cast<float*>(dynamic_shared());
  const int64_t row = blockIdx.x;
  const int row_vectors = args.size / kVector;
  grid_dependency_launch();
  uint4 weights[vectors], weights_before[is_twice ? vectors : 1];
#pragma unroll
  for (int i = 0; i < vectors; ++i) {
    const int at = threadIdx.x + i * blockDim.x;
    if (at >= row_vectors) continue;
    weights[i] = __ldg(static_cast<const uint4*>(args.weight) + at);
    if constexpr (is_twice) {
      weights_before[i] = __ldg(static_cast<const uint4*>(args.before) + at);
    }
  }
  grid_dependency_wait();
  const uint16_t* hidden_row = static_cast<const uint16_t*>(args.hidden) + row * args.hidden_stride;
  const uint4* hidden = reinterpret_cast<const uint4*>(hidden_row);
  uint4* residual = static_cast<uint4*>(args.residual);
  uint4* output = static_cast<uint4*>(args.output) + row * row_vectors;
  float values[vectors][kVector];
#pragma unroll
  for (int i = 0; i < vectors; ++i) {
    const int at = threadIdx.x + i * blockDim.x;
    if (at < row_vectors) unpack_8<T>(hidden[at], values[i]);
  }
  if constexpr (is_twice) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < vectors; ++i) {
      const int at = threadIdx.x + i * blockDim.x;
      if (at < row_vectors) squares += sum_of_squares(values[i]);
    }
    const float scale = rsqrtf(block_sum(squares, scratch) / float(args.size) + args.eps);
#pragma unroll
    for (int i = 0; i < vectors; ++i) {
      const int at = threadIdx.x + i * blockDim.x;
      if (at >= row_vectors) continue;
      multiply<T>(values[i], scale, weights_before[i]);
      // As it would have been stored and read again.
      unpack_8<T>(pack_8<T>(values[i]), values[i]);
    }
    __syncthreads();  // what block_sum left has been read
  }
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < vectors; ++i) {
    const int at = threadIdx.x + i * blockDim.x;
    if (at >= row_vectors) continue;
    if (residual != nullptr) {
      uint4* summed = residual + row * row_vectors + at;
      float before[kVector];
      unpack_8<T>(*summed, before);
#pragma unroll
      for (int j = 0; j < kVector; ++j) values[i][j] += before[j];
      *summed = pack_8<T>(values[i]);
      // What is normalised is the stream as the next layer reads it.
      unpack_8<T>(*summed, values[i]);
    }
    squares += sum_of_squares(values[i]);
  }
  const float scale = rsqrtf(block_sum(squares, scratch) / float(args.size) + args.eps);
#pragma unroll
  for (int i = 0; i < vectors; ++i) {
    const int at = threadIdx.x + i * blockDim.x;
    if (at >= row_vectors) continue;
    multiply<T>(values[i], scale, weights[i]);
    output[at] = pack_8<T>(values[i]);
  }
}

template <typename T, bool is_twice>
int32_t run_rms_norm(const RmsNormArgs& args, cudaStream_t stream) {
  const int row_vectors = args.size / kVector;
  const int vectors = (row_vectors + kMaxThreads - 1) / kMaxThreads;
  const int threads = ((row_vectors + vectors - 1) / vectors + 31) / 32 * 32;
  const Launch how{dim3(args.rows), dim3(threads), 32 * sizeof(float), stream, true};
  switch (vectors) {
    case 1:
      return launch(rms_norm_kernel<T, 1, is_twice>, how, args);
    case 2:
      return launch(rms_norm_kernel<T, 2, is_twice>, how, args);
    default:
      return cudaErrorInvalidValue;
  }
}

MESHSERVE_EXPORT int32_t meshserve_rms_norm(const RmsNormArgs* args, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (args->format == Format::bf16) {
    return (args->before == nullptr ? run_rms_norm<Bf16, false> : run_rms_norm<Bf16, true>)(*args,
                                                                                            on);
  }
  return (args->before == nullptr ? run_rms_norm<Fp16, false> : run_rms_norm<Fp16, true>)(*args,
                                                                                          on);
}

MESHSERVE_EXPORT const char* meshserve_error_name(int32_t error) {
  return cudaGetErrorName(static_cast<cudaError_t>(error));
}

}  // namespace meshserve
