// Root-mean-square normalisation of rows, and the residual addition before it.
//
// One block a row, which it reads once and keeps in registers: 8 elements (16 bytes) a thread and
// vector. A step of one token has one row of some 8 KB: there it is latency that counts, of the
// launch above all, so the kernel is launched early and fetches its weights, which nobody writes,
// before it waits for the row.
#include "launch.h"
#include "numbers.h"
#include "reductions.h"

namespace meshserve {

constexpr int kVector = 8;
constexpr int kMaxThreads = 1024;

struct RmsNormArgs {
  const void* hidden;  // [rows, size], rows hidden_stride elements apart
  void* residual;      // [rows, size] or null; the sum is written here
  const void* weight;  // [size]
  void* output;        // [rows, size]
  int64_t hidden_stride;
  int32_t rows;
  int32_t size;  // a multiple of 8
  float eps;
  Format format;
};

template <typename T, int vectors>
__global__ void __launch_bounds__(kMaxThreads) rms_norm_kernel(const RmsNormArgs args) {
  float* scratch = reinterpret_cast<float*>(dynamic_shared());
  const int64_t row = blockIdx.x;
  const int row_vectors = args.size / kVector;
  const uint4* weight = static_cast<const uint4*>(args.weight);
  uint4 weights[vectors];
#pragma unroll
  for (int i = 0; i < vectors; ++i) {
    const int at = threadIdx.x + i * blockDim.x;
    if (at < row_vectors) weights[i] = __ldg(weight + at);
  }
  grid_dependency_wait();
  grid_dependency_launch();
  const uint16_t* hidden_row = static_cast<const uint16_t*>(args.hidden) + row * args.hidden_stride;
  const uint4* hidden = reinterpret_cast<const uint4*>(hidden_row);
  uint4* residual = static_cast<uint4*>(args.residual);
  uint4* output = static_cast<uint4*>(args.output) + row * row_vectors;
  float values[vectors][kVector];
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < vectors; ++i) {
    const int at = threadIdx.x + i * blockDim.x;
    if (at >= row_vectors) continue;
    unpack_8<T>(hidden[at], values[i]);
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
#pragma unroll
    for (int j = 0; j < kVector; ++j) squares += values[i][j] * values[i][j];
  }
  const float scale = rsqrtf(block_sum(squares, scratch) / float(args.size) + args.eps);
#pragma unroll
  for (int i = 0; i < vectors; ++i) {
    const int at = threadIdx.x + i * blockDim.x;
    if (at >= row_vectors) continue;
    float factors[kVector];
    unpack_8<T>(weights[i], factors);
#pragma unroll
    for (int j = 0; j < kVector; ++j) values[i][j] *= scale * factors[j];
    output[at] = pack_8<T>(values[i]);
  }
}

template <typename T>
int32_t run_rms_norm(const RmsNormArgs& args, cudaStream_t stream) {
  const int row_vectors = args.size / kVector;
  const int vectors = (row_vectors + kMaxThreads - 1) / kMaxThreads;
  const int threads = ((row_vectors + vectors - 1) / vectors + 31) / 32 * 32;
  const Launch how{dim3(args.rows), dim3(threads), 32 * sizeof(float), stream, true};
  switch (vectors) {
    case 1:
      return launch(rms_norm_kernel<T, 1>, how, args);
    case 2:
      return launch(rms_norm_kernel<T, 2>, how, args);
    default:
      return cudaErrorInvalidValue;
  }
}

MESHSERVE_EXPORT int32_t meshserve_rms_norm(const RmsNormArgs* args, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  return args->format == Format::bf16 ? run_rms_norm<Bf16>(*args, on)
                                      : run_rms_norm<Fp16>(*args, on);
}

MESHSERVE_EXPORT const char* meshserve_error_name(int32_t error) {
  return cudaGetErrorName(static_cast<cudaError_t>(error));
}

}  // namespace meshserve
