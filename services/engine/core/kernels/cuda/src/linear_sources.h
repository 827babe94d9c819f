// Where a lane finds what is multiplied next, in device memory: weights, activations, and scales of
// groups; and how it is brought to shared memory.
#pragma once

#include "linear_tiles.h"

namespace meshserve {

template <typename W, typename S>
struct LinearSources : LinearTiles<W, S> {
  using Base = LinearTiles<W, S>;
  using Base::Base;
  using Base::kStepBytes, Base::kHiddenStep, Base::kBlockStep, Base::args, Base::lane, Base::g,
      Base::t, Base::warp, Base::across, Base::along, Base::weights_of, Base::hidden_of,
      Base::is_over, Base::advance, Base::output_of, Base::input_of;

  // What is fetched next: where this lane's chunk of each of its rows of weights is, and of the
  // activations, and how many inputs are left from the step of this warp on. Rows beyond the last
  // are read as that one, and not stored.
  struct Source {
    Work work;
    const unsigned char* weight[S::tiles * 2];
    const unsigned char* hidden;
    int inputs_left;
  };
  __device__ __forceinline__ void aim(Source& next) const {
    const int before = next.work.step * S::along + along;  // steps of a warp
    next.inputs_left = args.inputs - before * W::kStepInputs;
    next.hidden = static_cast<const unsigned char*>(args.hidden) + before * kHiddenStep +
                  first_hidden_row() * args.hidden_stride + lane % W::kHiddenChunks * kChunk;
#pragma unroll
    for (int row = 0; row < S::tiles * 2; ++row) {
      const int output = min(output_of(next.work, row / 2, row % 2), args.outputs - 1);
      next.weight[row] = static_cast<const unsigned char*>(args.weight) + before * kStepBytes +
                         output * args.weight_stride + t * kChunk;
    }
  }
  __device__ __forceinline__ void advance(Source& next) const {
    if (is_over(next.work)) return;
    if (advance(next.work)) {
      if (!is_over(next.work)) aim(next);
      return;
    }
    next.inputs_left -= kBlockStep;
    next.hidden += S::along * kHiddenStep;
#pragma unroll
    for (int row = 0; row < S::tiles * 2; ++row) next.weight[row] += S::along * kStepBytes;
  }

  // Start this lane's part of the weights of a step.
  __device__ __forceinline__ void fetch_weights(const Source& next, int stage) const {
    if (is_over(next.work)) return;
    unsigned char* to = weights_of(stage) + weight_slot(g, t);
    constexpr int chunk_inputs = W::kStepInputs / W::kSegments / kSegmentChunks;
#pragma unroll
    for (int segment = 0; segment < W::kSegments; ++segment) {
      const bool present = next.inputs_left > (segment * kSegmentChunks + t) * chunk_inputs;
#pragma unroll
      for (int row = 0; row < S::tiles * 2; ++row) {
        cp_async_16(to + (row * W::kSegments + segment) * kSegmentBytes,
                    next.weight[row] + segment * 64, present);
      }
    }
  }

  // The chunks of a step's activations that this lane brings: `each(index, offset in the stage,
  // address, whether it is there)`. Warps that share them divide them.
  static constexpr int kRowsAtOnce = S::across * 32 / W::kHiddenChunks;
  static constexpr int kCopies = S::columns * 8 / kRowsAtOnce;
  template <typename Each>
  __device__ __forceinline__ void for_hidden(const Source& next, Each each) const {
    if (is_over(next.work)) return;
    const int first = first_hidden_row(), chunk = lane % W::kHiddenChunks;
    const bool present = next.inputs_left > chunk * (W::kStepInputs / W::kHiddenChunks);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = i * kRowsAtOnce;
      if (first + row >= args.rows) break;
      each(i, hidden_slot<W::kHiddenChunks>(first + row, chunk),
           next.hidden + row * args.hidden_stride, present);
    }
  }
  __device__ __forceinline__ void fetch_hidden(const Source& next, int stage) const {
    unsigned char* to = hidden_of(stage);
    for_hidden(next, [to](int, int at, const unsigned char* from, bool present) {
      cp_async_16(to + at, from, present);
    });
  }

  // Those of the first stages, by copies of another kind: they do not wait for all the weights
  // that are on their way. As many are on their own way at once as there are registers for.
  __device__ __forceinline__ void bring_hidden(Source next) const {
    constexpr int at_once = kCopies * (S::stages - 1) <= 8 ? S::stages - 1 : 1;
#pragma unroll 1
    for (int first = 0; first < S::stages - 1; first += at_once) {
      uint4 held[at_once][kCopies];
      Source reading = next;
#pragma unroll
      for (int i = 0; i < at_once; ++i) {
        for_hidden(reading, [&](int copy, int, const unsigned char* from, bool present) {
          held[i][copy] = present ? *reinterpret_cast<const uint4*>(from) : uint4{};
        });
        advance(reading);
      }
#pragma unroll
      for (int i = 0; i < at_once; ++i) {
        unsigned char* to = hidden_of(first + i);
        for_hidden(next, [&](int copy, int at, const unsigned char*, bool) {
          *reinterpret_cast<uint4*>(to + at) = held[i][copy];
        });
        advance(next);
      }
    }
  }
  __device__ __forceinline__ int first_hidden_row() const {
    return (across * 32 + lane) / W::kHiddenChunks;
  }

  // Scales and minima of the groups of a step, as they lie: of each row the halves of at most 4
  // groups. They are fetched a step ahead of their use, where there are registers for it.
  struct Groups {
    static constexpr int rows = W::kGrouped ? S::tiles * 2 : 1;
    uint2 scales[rows];
    uint2 minima[rows];
  };
  // Where those of this lane's rows are, from the first of all on.
  struct GroupSource {
    int at[Groups::rows];
    int inputs_left;
  };
  __device__ __forceinline__ void aim(GroupSource& next, const Work& work) const {
    if constexpr (W::kGrouped) {
      next.inputs_left = args.inputs - input_of(work);
#pragma unroll
      for (int row = 0; row < S::tiles * 2; ++row) {
        const int output = min(output_of(work, row / 2, row % 2), args.outputs - 1);
        next.at[row] =
            output * (args.inputs >> args.group_shift) + (input_of(work) >> args.group_shift);
      }
    }
  }
  __device__ __forceinline__ void advance(GroupSource& next, const Work& work, bool is_new) const {
    if constexpr (W::kGrouped) {
      if (is_new) {
        if (!is_over(work)) aim(next, work);
        return;
      }
      next.inputs_left -= kBlockStep;
#pragma unroll
      for (int row = 0; row < S::tiles * 2; ++row) next.at[row] += kBlockStep >> args.group_shift;
    }
  }
  __device__ __forceinline__ void fetch_groups(const GroupSource& next, Groups& groups) const {
    if constexpr (W::kGrouped) {
      if (next.inputs_left <= 0) return;
#pragma unroll
      for (int row = 0; row < S::tiles * 2; ++row) {
        groups.scales[row] = fetch_halves(args.scales, next.at[row]);
        if (args.minima != nullptr) groups.minima[row] = fetch_halves(args.minima, next.at[row]);
      }
    }
  }
  // As many halves as there are groups in a step.
  __device__ __forceinline__ uint2 fetch_halves(const void* halves, int at) const {
    const uint16_t* from = static_cast<const uint16_t*>(halves) + at;
    if (args.group_shift == 7) return {__ldg(from), 0};
    if (args.group_shift == 6) return {__ldg(reinterpret_cast<const uint32_t*>(from)), 0};
    return __ldg(reinterpret_cast<const uint2*>(from));
  }
};

}  // namespace meshserve
