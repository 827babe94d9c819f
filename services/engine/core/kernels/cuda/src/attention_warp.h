// What a warp does: it attends to tiles of the cache one after another, by itself.
#pragma once

#include <cmath>

#include "attention_parts.h"
#include "attention_tiles.h"

namespace meshserve {

constexpr int kStages = 3;
constexpr int kMaxWarps = 8;
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
    // Tiles without a token of this step, which the kernel before this one writes.
    const int settled = args.is_settled ? (part.seen_by_first - 1) / Shape::kTokens : 0;
#pragma unroll
    for (int ahead = 0; ahead < kStages - 1; ++ahead) {
      const int tile = first + ahead * args.warps;
      if (tile < min(settled, part.tile_end)) {
        reader.copy(tile, blocks[ahead], stages + ahead * Shape::kStageBytes);
      }
    }
    if (args.is_settled) grid_dependency_wait();
#pragma unroll
    for (int ahead = 0; ahead < kStages - 1; ++ahead) {
      const int tile = first + ahead * args.warps;
      if (tile >= settled && tile < part.tile_end) {
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

}  // namespace meshserve
