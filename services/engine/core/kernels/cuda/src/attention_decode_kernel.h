// Attention of few queries a sequence over the paged cache, by splits of its tokens
// (flash-decoding; Dao et al., arXiv:2307.08691), with the query heads of a KV head as one matrix
// (arXiv:2305.13245).
//
// What bounds it is reading the cache: for each KV head 512 bytes a token of bf16 at head_dim 128,
// of which an H100 moves some 23 GB/s to each of 132 multiprocessors. With 0.8 us of latency that
// takes 18 KiB under way on each at all times. Here a warp by itself keeps two stages of 8 KiB on
// their way while it computes with a third: 8 warps (192 KiB, one block) have 128 KiB under way,
// and no barrier stops them, since a warp waits for its own copies alone. With many sequences two
// blocks of 4 warps share the multiprocessor, so that one begins or ends while the other streams.
//
// A warp's tile of 8 KiB costs 16 products of 16 x 8 x 16, 16 ldmatrix and some 450 other
// instructions (as compiled for sm_90a, of bf16 at head_dim 128), and memory takes 600 cycles for
// it: a fifth of the issue slots, and a tenth of the tensor cores. Elements of eight bits take
// 1,100 instructions to 8 KiB, half of the slots. Keys are the left factor, so that 8 rows (a group
// of query heads) fill a product: scores come out as [token, row], and movmatrix turns their
// weights into the right factor of the second product, whose sums are [dimension, row].
//
// At batch 1 and 8,192 tokens, 33.5 MB take 11.2 us at 3 TB/s, and each microsecond besides is 8 %.
// So there is one kernel: the last block of a sequence and head to finish adds up the parts. And
// while the kernel before it norms and rotates one token, for some 2 us, it has its first tiles on
// their way, 128 KiB of each multiprocessor: all tokens but the step's own were there before.
#pragma once

#include "attention_parts.h"
#include "attention_warp.h"

namespace meshserve {

template <typename Q, typename Cache, int kHeadDim, int kRowTiles>
__global__ void __launch_bounds__(32 * kMaxWarps, 1)
    attention_decode_kernel(const __grid_constant__ AttentionDecodeArgs args) {
  using Does = Decode<Q, Cache, kHeadDim, kRowTiles>;
  constexpr int kRows = Does::kRows;
  // The step's lengths and blocks were last read a layer ago, and have left the L2 cache since.
  const int32_t* table = args.block_tables + int64_t(blockIdx.z) * args.table_stride;
  if (int(threadIdx.x) * 32 < args.table_stride) prefetch_l2(table + threadIdx.x * 32);
  if (threadIdx.x == 0) prefetch_l2(args.contexts + blockIdx.z);
  if (threadIdx.x == 32) prefetch_l2(args.query_starts + blockIdx.z);
  grid_dependency_launch();
  if (!args.is_settled) grid_dependency_wait();
  Part part;
  if (!find_part<kRows, Does::Shape::kTokens>(args, part)) {
    grid_dependency_wait();  // every kernel does: or the next one would not wait for earlier ones
    return;
  }

  typename Does::State state;
#pragma unroll
  for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      state.highest[n][i] = kLowest;
      state.weights[n][i] = 0.0f;
      const int row = 8 * n + 2 * (threadIdx.x % 4) + i;
      state.last[n][i] = part.seen_by_first + part.split_row(row, args).x - 1;
    }
#pragma unroll
    for (int m = 0; m < Does::kSumTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) state.sums[m][n][i] = 0.0f;
    }
  }
  unsigned char* shared = dynamic_shared();
  Does::attend_all(args, part, shared + threadIdx.x / 32 * Does::kWarpBytes, state);

  __syncthreads();  // the stages are free
  float* sums = reinterpret_cast<float*>(shared);
  float2* totals = reinterpret_cast<float2*>(sums + args.warps * kRows * Does::kPitch);
  Does::share_sums(state, sums, totals);
  __syncthreads();
#pragma unroll 1
  for (int at = threadIdx.x; at < part.rows * kHeadDim / 4; at += blockDim.x) {
    const int row = at / (kHeadDim / 4), dimension = at % (kHeadDim / 4) * 4;
    float highest = kLowest, weights = 0.0f;
#pragma unroll 1
    for (int warp = 0; warp < args.warps; ++warp) {
      highest = fmaxf(highest, totals[warp * kRows + row].x);
    }
    float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
    for (int warp = 0; warp < args.warps; ++warp) {
      const float2 total = totals[warp * kRows + row];
      const float factor = exp2_approximate(total.x - highest);
      weights += total.y * factor;
      const float* from = sums + (warp * kRows + row) * Does::kPitch + dimension;
      add_scaled(sum, *reinterpret_cast<const float4*>(from), factor);
    }
    if (part.parts == 1) {
      write_row<Q, kHeadDim>(args, part, row, dimension, sum, 1.0f / weights);
    } else {
      const int64_t to = (int64_t(part.pair) * args.splits + part.split) * kRows + row;
      __stcg(reinterpret_cast<float4*>(args.parts + to * kHeadDim + dimension), sum);
      if (dimension == 0) __stcg(args.part_sums + to, make_float2(highest, weights));
    }
  }
  if (part.parts == 1) return;

  __threadfence();
  __syncthreads();
  int* is_last = reinterpret_cast<int*>(shared);
  if (threadIdx.x == 0) {
    const uint32_t last = uint32_t(part.parts) - 1;
    *is_last = atomicInc(args.arrived + part.pair, last) == last;
  }
  __syncthreads();
  if (!*is_last) return;
  __threadfence();
  combine_parts<Q, kHeadDim, kRows>(args, part, reinterpret_cast<float*>(shared) + 4);
}

template <typename Q, typename Cache, int kHeadDim, int kRowTiles>
int32_t start_decode(const AttentionDecodeArgs& args, cudaStream_t stream) {
  using Does = Decode<Q, Cache, kHeadDim, kRowTiles>;
  const dim3 grid(args.kv_heads, args.row_tiles * args.splits, args.sequences);
  const Launch how{grid, dim3(32 * args.warps), size_t(args.warps) * Does::kWarpBytes, stream,
                   true};
  return launch(attention_decode_kernel<Q, Cache, kHeadDim, kRowTiles>, how, args);
}

template <typename Q, typename Cache>
int32_t attend_few(const AttentionDecodeArgs& args, cudaStream_t stream) {
  switch (args.head_dim) {
    case 64:
      return args.rows == 8 ? start_decode<Q, Cache, 64, 1>(args, stream)
                            : start_decode<Q, Cache, 64, 2>(args, stream);
    case 128:
      return args.rows == 8 ? start_decode<Q, Cache, 128, 1>(args, stream)
                            : start_decode<Q, Cache, 128, 2>(args, stream);
    case 256:
      // Of 16 rows the sums alone would be 128 registers.
      return start_decode<Q, Cache, 256, 1>(args, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <typename Cache>
int32_t attend_by_query(const AttentionDecodeArgs& args, cudaStream_t stream) {
  return args.query_format == Format::bf16 ? attend_few<Bf16, Cache>(args, stream)
                                           : attend_few<Fp16, Cache>(args, stream);
}

}  // namespace meshserve
