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
// So there is one kernel: the last block of a sequence and head to finish adds up the parts.
#pragma once

#include <cmath>

#include "attention_tiles.h"
#include "reductions.h"

namespace meshserve {

constexpr int kStages = 3;
constexpr int kMaxWarps = 8;
constexpr int kPartsAtOnce = 8;
// Below all scores, and finite: the difference of two of it is zero.
constexpr float kLowest = -1e30f;
constexpr float kLog2E = 1.4426950408889634f;

template <typename Q, typename Cache, int kHeadDim, int kRowTiles>
struct Decode {
  using Shape = Tile<Cache, kHeadDim>;
  using Compute = typename Cache::Compute;
  static constexpr int kRows = 8 * kRowTiles;
  static constexpr int kSumTiles = kHeadDim / 16;
  static constexpr int kWarpBytes = kStages * Shape::kStageBytes;
  static constexpr int kPitch = kHeadDim + 4;  // floats from row to row where warps are added up
  static_assert(kWarpBytes >= kRows * (kPitch + 2) * 4, "what warps add up has no room");

  // Of the two rows in each tile of eight that a lane computes with: 2 (lane % 4), and the next.
  struct State {
    float highest[kRowTiles][2];
    float weights[kRowTiles][2];          // of the lane's own tokens
    float sums[kSumTiles][kRowTiles][4];  // dimensions x rows
    uint32_t queries[kSumTiles][kRowTiles][2];
    int last[kRowTiles][2];  // the last token that the row sees
  };

  static __device__ __forceinline__ void score(const unsigned char* keys, const State& state,
                                               float (&scores)[kRowTiles][4]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[n][i] = 0.0f;
    }
#pragma unroll
    for (int unit = 0; unit < Shape::kUnits; ++unit) {
      uint32_t raw[4], a[Cache::kFragments][4];
      ldmatrix_x4(raw, keys + Shape::place(lane % 16, 2 * unit + lane / 16));
      Cache::keys(raw, a);
#pragma unroll
      for (int f = 0; f < Cache::kFragments; ++f) {
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) {
          Compute::mma(scores[n], a[f], state.queries[unit * Cache::kFragments + f][n]);
        }
      }
    }
  }

  // Scores of tokens first and first + 8 become exponents of two.
  static __device__ __forceinline__ void finish_scores(const AttentionDecodeArgs& args, int first,
                                                       bool masked, const float* key_scales,
                                                       const State& state,
                                                       float (&scores)[kRowTiles][4]) {
    const float factor = args.scale * Cache::kFactor;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float of_token =
          Cache::kScaled ? factor * key_scales[threadIdx.x % 32 / 4 + 8 * half] : factor;
      const int token = first + 8 * half;
#pragma unroll
      for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& each = scores[n][2 * half + i];
          if (args.softcap > 0.0f) {
            const float twice = 2.0f * kLog2E * of_token / args.softcap * each;
            const float tanh = 1.0f - __fdividef(2.0f, exp2_approximate(twice) + 1.0f);
            each = args.softcap * kLog2E * tanh;
          } else {
            each *= of_token * kLog2E;
          }
          const int last = state.last[n][i];
          const bool hidden = token > last || (args.window > 0 && token <= last - args.window);
          if (masked && hidden) each = -INFINITY;
        }
      }
    }
  }

  // Scores become weights; what was summed up before is scaled to the new greatest score.
  static __device__ __forceinline__ void weigh(State& state, float (&scores)[kRowTiles][4]) {
    float scaling[kRowTiles][2];
    bool higher = false;
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float highest = fmaxf(scores[n][i], scores[n][i + 2]);
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2) {
          highest = fmaxf(highest, __shfl_xor_sync(kWholeWarp, highest, distance));
        }
        highest = fmaxf(highest, state.highest[n][i]);
        higher |= highest > state.highest[n][i];
        scaling[n][i] = exp2_approximate(state.highest[n][i] - highest);
        state.highest[n][i] = highest;
        scores[n][i] = exp2_approximate(scores[n][i] - highest);
        scores[n][i + 2] = exp2_approximate(scores[n][i + 2] - highest);
        state.weights[n][i] = state.weights[n][i] * scaling[n][i] + scores[n][i] + scores[n][i + 2];
      }
    }
    if (!__any_sync(kWholeWarp, higher)) return;
#pragma unroll
    for (int m = 0; m < kSumTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) state.sums[m][n][i] *= scaling[n][i % 2];
      }
    }
  }

  static __device__ __forceinline__ void add_values(const unsigned char* values,
                                                    const float* value_scales, State& state,
                                                    float (&weights)[kRowTiles][4]) {
    const int lane = threadIdx.x % 32;
    uint32_t b[kRowTiles][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float of_token = Cache::kScaled ? value_scales[lane / 4 + 8 * half] : 1.0f;
#pragma unroll
      for (int n = 0; n < kRowTiles; ++n) {
        const float* pair = &weights[n][2 * half];
        b[n][half] = movmatrix_trans(Compute::pack(pair[0] * of_token, pair[1] * of_token));
      }
    }
#pragma unroll
    for (int unit = 0; unit < Shape::kUnits; ++unit) {
      uint32_t raw[4], a[Cache::kFragments][4];
      ldmatrix_x4_trans(raw,
                        values + Shape::place(lane / 16 * 8 + lane % 8, 2 * unit + lane / 8 % 2));
      Cache::values(raw, a);
#pragma unroll
      for (int f = 0; f < Cache::kFragments; ++f) {
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) {
          Compute::mma(state.sums[unit * Cache::kFragments + f][n], a[f], b[n]);
        }
      }
    }
  }

  static __device__ __forceinline__ void attend(const AttentionDecodeArgs& args, const Part& part,
                                                int tile, const unsigned char* stage,
                                                State& state) {
    const int first_token = tile * Shape::kTokens;
    const int seen_by_all = part.seen_by_first + part.split_row(0, args).x;
    const bool masked = first_token + Shape::kTokens > seen_by_all ||
                        (args.window > 0 && first_token < part.end - args.window);
#pragma unroll
    for (int at = 0; at < Shape::kTokens; at += 16) {
      const unsigned char* keys = stage + at * Shape::kRowBytes;
      const float* scales = reinterpret_cast<const float*>(stage + 2 * Shape::kBytes) + at;
      float scores[kRowTiles][4];
      score(keys, state, scores);
      finish_scores(args, first_token + at + threadIdx.x % 32 / 4, masked, scales, state, scores);
      weigh(state, scores);
      add_values(keys + Shape::kBytes, scales + Shape::kTokens, state, scores);
    }
  }

  // The tiles of a warp, one after another, with kStages - 1 of them on their way.
  static __device__ __forceinline__ void attend_all(const AttentionDecodeArgs& args,
                                                    const Part& part, unsigned char* stages,
                                                    State& state) {
    using Reader = TileReader<Cache, kHeadDim>;
    const int first = part.tile_begin + int(threadIdx.x) / 32;
    const Reader reader(args, part);
    typename Reader::Blocks blocks[kStages];
#pragma unroll
    for (int ahead = 0; ahead < kStages; ++ahead) {
      blocks[ahead] = reader.find_blocks(first + ahead * args.warps);
    }
#pragma unroll
    for (int ahead = 0; ahead < kStages - 1; ++ahead) {
      const int tile = first + ahead * args.warps;
      if (tile < part.tile_end) {
        reader.copy(tile, blocks[ahead], stages + ahead * Shape::kStageBytes);
      }
      cp_async_commit();
    }
    typename Reader::Blocks next_blocks = blocks[kStages - 1];
    load_queries<Q, Cache, kHeadDim, kRowTiles>(args, part, state.queries);
    int slot = 0;
    for (int tile = first; tile < part.tile_end; tile += args.warps) {
      cp_async_wait<kStages - 2>();
      // Also: all lanes are done with the stage that is filled next.
      __syncwarp();
      const int next = tile + (kStages - 1) * args.warps;
      const int free = slot == 0 ? kStages - 1 : slot - 1;
      if (next < part.tile_end) {
        reader.copy(next, next_blocks, stages + free * Shape::kStageBytes);
        next_blocks = reader.find_blocks(next + args.warps);
      }
      cp_async_commit();
      attend(args, part, tile, stages + slot * Shape::kStageBytes, state);
      slot = slot == kStages - 1 ? 0 : slot + 1;
    }
    cp_async_wait<0>();
  }

  // To shared memory, for all warps: sums[warp][row][dimension], and (greatest score, weights).
  static __device__ __forceinline__ void share_sums(const State& state, float* sums,
                                                    float2* totals) {
    const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, in_group = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = warp * kRows + 8 * n + 2 * in_group + i;
        float weights = state.weights[n][i];
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2) {
          weights += __shfl_xor_sync(kWholeWarp, weights, distance);
        }
        if (group == 0) totals[row] = {state.highest[n][i], weights};
#pragma unroll
        for (int m = 0; m < kSumTiles; ++m) {
          float* at = sums + row * kPitch + 16 * m;
          at[Cache::dimension(group, false)] = state.sums[m][n][i] * Cache::kFactor;
          at[Cache::dimension(group, true)] = state.sums[m][n][i + 2] * Cache::kFactor;
        }
      }
    }
  }
};

__device__ __forceinline__ void add_scaled(float4& sum, const float4& each, float factor) {
  sum.x += each.x * factor;
  sum.y += each.y * factor;
  sum.z += each.z * factor;
  sum.w += each.w * factor;
}

template <typename Q, int kHeadDim>
__device__ __forceinline__ void write_row(const AttentionDecodeArgs& args, const Part& part,
                                          int row, int dimension, const float4& sum, float factor) {
  const int2 place = place_of(part, row, args);
  const int64_t heads = int64_t(args.kv_heads) * args.heads_per_kv;
  uint16_t* output = static_cast<uint16_t*>(args.output);
  *reinterpret_cast<uint2*>(output + (place.x * heads + place.y) * kHeadDim + dimension) = {
      Q::pack(sum.x * factor, sum.y * factor), Q::pack(sum.z * factor, sum.w * factor)};
}

// Adds up the parts that other blocks wrote, in their order, whichever block was the last.
template <typename Q, int kHeadDim, int kRows>
__device__ void combine_parts(const AttentionDecodeArgs& args, const Part& part, float* factors) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first = int64_t(part.pair) * args.splits * kRows;
#pragma unroll 1
  for (int row = warp; row < part.rows; row += args.warps) {
    float highest = kLowest, weights = 0.0f;
#pragma unroll 1
    for (int i = lane; i < part.parts; i += 32) {
      highest = fmaxf(highest, __ldcg(args.part_sums + first + i * kRows + row).x);
    }
    highest = warp_max(highest);
#pragma unroll 1
    for (int i = lane; i < part.parts; i += 32) {
      const float2 each = __ldcg(args.part_sums + first + i * kRows + row);
      const float factor = exp2_approximate(each.x - highest);
      factors[i * kRows + row] = factor;
      weights += factor * each.y;
    }
    weights = warp_sum(weights);
    __syncwarp();
#pragma unroll 1
    for (int i = lane; i < part.parts; i += 32) factors[i * kRows + row] /= weights;
  }
  __syncthreads();
#pragma unroll 1
  for (int at = threadIdx.x; at < part.rows * kHeadDim / 4; at += blockDim.x) {
    const int row = at / (kHeadDim / 4), dimension = at % (kHeadDim / 4) * 4;
    const float* from = args.parts + (first + row) * kHeadDim + dimension;
    float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
    // Those of a batch are read at once: it is how often one waits that counts.
    for (int i = 0; i < part.parts; i += kPartsAtOnce) {
      float4 each[kPartsAtOnce];
#pragma unroll
      for (int j = 0; j < kPartsAtOnce; ++j) {
        const int64_t offset = int64_t(min(i + j, part.parts - 1)) * kRows * kHeadDim;
        each[j] = __ldcg(reinterpret_cast<const float4*>(from + offset));
      }
#pragma unroll
      for (int j = 0; j < kPartsAtOnce; ++j) {
        if (i + j < part.parts) add_scaled(sum, each[j], factors[(i + j) * kRows + row]);
      }
    }
    write_row<Q, kHeadDim>(args, part, row, dimension, sum, 1.0f);
  }
}

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
  grid_dependency_wait();
  grid_dependency_launch();
  Part part;
  if (!find_part<kRows, Does::Shape::kTokens>(args, part)) return;

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
