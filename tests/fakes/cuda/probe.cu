// Kernels that use one instruction each, and kernels with a mistake that the emulator must find.
#include "launch.h"
#include "numbers.h"
#include "reductions.h"

namespace meshserve {

struct ProbeArgs {
  const unsigned char* a;
  const unsigned char* b;
  void* out;
  int32_t choice;
};

constexpr int kThreads = 64;

// The four or two bytes-wide registers of a lane, read as the manual's tables of fragments say.
template <int size>
__device__ void read_fragments(const ProbeArgs& args, uint32_t (&a)[4], uint32_t (&b)[2]) {
  constexpr int depth = 32 / size, each = 4 / size;
  const int group = threadIdx.x / 4, in_group = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = group + (i == 1 || i == 3 ? 8 : 0);
    const int column = in_group * each + (i >= 2 ? depth / 2 : 0);
    a[i] = *reinterpret_cast<const uint32_t*>(args.a + (row * depth + column) * size);
  }
  for (int i = 0; i < 2; ++i) {
    b[i] = 0;
    for (int j = 0; j < each; ++j) {
      const int row = in_group * each + j + i * depth / 2;
      uint32_t element = args.b[(row * 8 + group) * size];
      if (size == 2) element |= uint32_t(args.b[(row * 8 + group) * size + 1]) << 8;
      b[i] |= element << j * 8 * size;
    }
  }
}

template <typename Sum>
__device__ void write_sums(const ProbeArgs& args, const Sum (&d)[4]) {
  Sum* out = static_cast<Sum*>(args.out);
  for (int i = 0; i < 4; ++i) {
    out[(threadIdx.x / 4 + i / 2 * 8) * 8 + threadIdx.x % 4 * 2 + i % 2] = d[i];
  }
}

// out += a * b, both row by row.
__global__ void multiply_kernel(const ProbeArgs args) {
  uint32_t a[4], b[2];
  float d[4] = {};
  int32_t integers[4] = {};
  switch (args.choice) {
    case 0:
      read_fragments<2>(args, a, b);
      mma_m16n8k16_bf16(d, a, b);
      return write_sums(args, d);
    case 1:
      read_fragments<2>(args, a, b);
      mma_m16n8k16_fp16(d, a, b);
      return write_sums(args, d);
    case 2:
      read_fragments<1>(args, a, b);
      mma_m16n8k32_e4m3(d, a, b);
      return write_sums(args, d);
    default:
      read_fragments<1>(args, a, b);
      mma_m16n8k32_s8(integers, a, b);
      return write_sums(args, integers);
  }
}

// The product of bf16 again, with fragments that ldmatrix reads from shared memory.
__global__ void load_matrices_kernel(const ProbeArgs args) {
  unsigned char* left = dynamic_shared();
  unsigned char* right = left + 16 * 32;
  const int lane = threadIdx.x;
  cp_async_16(left + lane * 16, args.a + lane * 16, true);
  cp_async_16(right + lane % 16 * 16, args.b + lane % 16 * 16, true);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  uint32_t a[4], b[2];
  float d[4] = {};
  ldmatrix_x4(a, left + lane % 16 * 32 + lane / 16 * 16);
  if (args.choice == 0) {
    ldmatrix_x2_trans(b, right + lane % 16 * 16);
  } else {
    // b was passed by columns: eight rows of 16.
    ldmatrix_x2(b, right + lane % 8 * 32 + lane / 8 % 2 * 16);
  }
  mma_m16n8k16_bf16(d, a, b);
  write_sums(args, d);
}

// A matrix of 8 by 8 elements of two bytes, transposed on its way through registers.
__global__ void transpose_kernel(const ProbeArgs args) {
  const int lane = threadIdx.x, row = lane / 4, column = lane % 4 * 2;
  const uint16_t* in = reinterpret_cast<const uint16_t*>(args.a) + row * 8 + column;
  uint16_t* out = static_cast<uint16_t*>(args.out) + row * 8 + column;
  const uint32_t pair = movmatrix_trans(in[0] | uint32_t(in[1]) << 16);
  out[0] = uint16_t(pair);
  out[1] = uint16_t(pair >> 16);
}

// What each lane gets of others, and of its warp.
__global__ void exchange_kernel(const ProbeArgs args) {
  int32_t* out = static_cast<int32_t*>(args.out) + threadIdx.x * 6;
  const int lane = threadIdx.x % 32;
  out[0] = __shfl_sync(kWholeWarp, lane, 5, 8);
  out[1] = __shfl_xor_sync(kWholeWarp, lane, 3);
  out[2] = __shfl_down_sync(kWholeWarp, lane, 4);
  out[3] = __shfl_up_sync(kWholeWarp, lane, 1, 16);
  out[4] = int32_t(__ballot_sync(kWholeWarp, lane % 3 == 0));
  out[5] = int32_t(warp_sum(float(lane)));
}

// Reverses 64 numbers in shared memory. Each choice but 0 lacks something.
__global__ void mistake_kernel(const ProbeArgs args) {
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  float* out = static_cast<float*>(args.out);
  const int at = threadIdx.x, source = kThreads - 1 - at;
  const float* in = reinterpret_cast<const float*>(args.a);
  switch (args.choice) {
    case 0:  // nothing
    case 1:  // the barrier
      shared[at] = in[at];
      if (args.choice == 0) __syncthreads();
      out[at] = shared[source];
      break;
    case 2:  // waiting for the copy
    case 3:  // nothing
      if (at < kThreads / 4) cp_async_16(shared + 4 * at, in + 4 * at, true);
      cp_async_commit();
      if (args.choice == 3) cp_async_wait<0>();
      __syncthreads();
      out[at] = shared[source];
      break;
    case 4:  // the end of the input
      out[at] = in[at + 1];
      break;
    case 5:  // the end of shared memory
      shared[at + 1] = in[at];
      break;
    case 6:  // a barrier that all come to
      if (at < 40) __shfl_sync(kWholeWarp, 0.0f, 0);
      break;
    case 7:  // alignment
      load_16_streaming(in + 1);
      break;
    case 8:  // lanes that agree
      if (at % 2 == 0) {
        __ballot_sync(kWholeWarp, 1);
      } else {
        __shfl_sync(kWholeWarp, 0.0f, 0);
      }
      break;
    case 9:  // a wait before shared memory is used again
      shared[at] = in[at];
      __syncthreads();
      out[at] = shared[source];
      shared[at] = NAN;
      break;
  }
}

// Each block adds its number to a sum; the last one to come writes it.
__global__ void last_block_kernel(const ProbeArgs args) {
  int32_t* out = static_cast<int32_t*>(args.out);
  if (threadIdx.x != 0) return;
  atomicAdd(out, int32_t(blockIdx.x));
  __threadfence();
  uint32_t* arrived = reinterpret_cast<uint32_t*>(out + 1);
  if (atomicInc(arrived, gridDim.x - 1) == gridDim.x - 1) out[2] = __ldcg(out);
}

// One card writes what another has waited for, a word of it.
__global__ void hand_over_kernel(const ProbeArgs args) {
  uint4* out = static_cast<uint4*>(args.out);
  if (args.choice == 0) {
    store_16_system(out, {1, 2, 3, 4});
  } else {
    uint4 found = load_16_system(args.a);
    while (found.x == 0) found = load_16_system(args.a);
    *out = found;
  }
}

template <typename Kernel>
int32_t probe(Kernel kernel, const ProbeArgs* args, void* stream, int blocks, int threads,
              size_t smem_bytes) {
  const Launch how{dim3(blocks), dim3(threads), smem_bytes, static_cast<cudaStream_t>(stream)};
  return launch(kernel, how, *args);
}

MESHSERVE_EXPORT int32_t meshserve_multiply(const ProbeArgs* args, void* stream) {
  return probe(multiply_kernel, args, stream, 1, 32, 0);
}
MESHSERVE_EXPORT int32_t meshserve_load_matrices(const ProbeArgs* args, void* stream) {
  return probe(load_matrices_kernel, args, stream, 1, 32, 16 * 32 + 16 * 16);
}
MESHSERVE_EXPORT int32_t meshserve_transpose(const ProbeArgs* args, void* stream) {
  return probe(transpose_kernel, args, stream, 1, 32, 0);
}
MESHSERVE_EXPORT int32_t meshserve_exchange(const ProbeArgs* args, void* stream) {
  return probe(exchange_kernel, args, stream, 1, kThreads, 0);
}
MESHSERVE_EXPORT int32_t meshserve_mistake(const ProbeArgs* args, void* stream) {
  return probe(mistake_kernel, args, stream, 1, kThreads, kThreads * sizeof(float));
}
MESHSERVE_EXPORT int32_t meshserve_last_block(const ProbeArgs* args, void* stream) {
  return probe(last_block_kernel, args, stream, 7, 32, 0);
}
MESHSERVE_EXPORT int32_t meshserve_hand_over(const ProbeArgs* args, void* stream) {
  return probe(hand_over_kernel, args, stream, 1, 1, 0);
}
MESHSERVE_EXPORT int32_t meshserve_greedy(const ProbeArgs* args, void* stream) {
  return probe(mistake_kernel, args, stream, 1, kThreads, 228 * 1024);
}
MESHSERVE_EXPORT const char* meshserve_error_name(int32_t error) {
  return cudaGetErrorName(static_cast<cudaError_t>(error));
}

}  // namespace meshserve
