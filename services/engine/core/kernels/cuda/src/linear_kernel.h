// The kernel of linear.h, and how it is started.
#pragma once

#include <algorithm>

#include "linear.h"
#include "linear_epilogue.h"
#include "linear_weights.h"

namespace meshserve {

// How a block of `across * along` warps divides a tile: `across` of them share the activations,
// each with 16 * tiles outputs; `along` of them split the inputs of a step.
template <int tiles_, int columns_, int across_, int along_, int stages_, int resident_ = 2>
struct Shape {
  static constexpr int tiles = tiles_;      // of 16 outputs, of a warp
  static constexpr int columns = columns_;  // of 8 tokens
  static constexpr int across = across_;
  static constexpr int along = along_;
  static constexpr int stages = stages_;
  static constexpr int resident = resident_;  // blocks that registers are to suffice for
  static constexpr int threads = across * along * 32;
  static constexpr int outputs = tiles * across * 16;  // of a tile of a block
};

// What a block works on: part `item % splits` of the inputs of tile `item / splits`, in steps of
// all its warps.
struct Work {
  int item;
  int tile;
  int step;
  int end;
};

template <typename W, typename S>
struct LinearKernel {
  using Sum = typename W::Accumulator;
  static constexpr int kStepBytes = W::kSegments * 64;  // of a row of weights, of a warp
  static constexpr int kWeightBytes = S::tiles * 2 * W::kSegments * kSegmentBytes;  // of a warp
  static constexpr int kHiddenStep = W::kHiddenChunks * kChunk;  // of a row of activations
  static constexpr int kBlockStep = W::kStepInputs * S::along;
  static constexpr int kFragments = S::tiles * S::columns;
  // Whether there are registers for the scales of two steps.
  static constexpr bool kScalesAhead = S::columns < 8;

  const LinearArgs& args;
  const int lane = threadIdx.x % 32;
  const int g = lane / 4;
  const int t = lane % 4;
  const int warp = threadIdx.x / 32;
  const int across = warp % S::across;
  const int along = warp / S::across;
  const int items;
  const int stage_bytes;
  unsigned char* const shared = dynamic_shared();

  // Rounded up, so that whole rows of banks are turned around.
  static __host__ __device__ int hidden_bytes_of(int rows) {
    return (rows * kHiddenStep + 127) / 128 * 128;
  }
  static __host__ __device__ int stage_bytes_of(int rows) {
    return S::along * (S::across * kWeightBytes + hidden_bytes_of(rows));
  }
  static __host__ __device__ int shared_bytes(int rows) {
    return S::stages * stage_bytes_of(rows) +
           (S::along - 1) * S::across * kFragments * 32 * int(sizeof(float4));
  }
  static __host__ __device__ int tiles_of(const LinearArgs& a) {
    return (a.outputs + S::outputs - 1) / S::outputs;
  }
  static __host__ __device__ int steps_of(const LinearArgs& a) {
    return (a.inputs + kBlockStep - 1) / kBlockStep;
  }

  __device__ __forceinline__ explicit LinearKernel(const LinearArgs& a)
      : args(a), items(tiles_of(a) * a.splits), stage_bytes(stage_bytes_of(a.rows)) {}

  __device__ __forceinline__ unsigned char* weights_of(int stage) const {
    return shared + stage * stage_bytes + warp * kWeightBytes;
  }
  __device__ __forceinline__ unsigned char* hidden_of(int stage) const {
    return shared + stage * stage_bytes + S::across * S::along * kWeightBytes +
           along * hidden_bytes_of(args.rows);
  }

  __device__ __forceinline__ Work first() const {
    Work work{int(blockIdx.x), 0, 0, 0};
    enter(work);
    return work;
  }
  __device__ __forceinline__ void enter(Work& work) const {
    const uint32_t splits = args.splits, steps = steps_of(args);
    if (splits == 1) {
      work.tile = work.item;
      work.step = 0;
      work.end = steps;
      return;
    }
    work.tile = work.item / splits;
    const uint32_t split = work.item % splits;
    work.step = steps * split / splits;
    work.end = steps * (split + 1) / splits;
  }
  __device__ __forceinline__ bool is_over(const Work& work) const { return work.item >= items; }
  // Whether what follows is another tile, or another part of one.
  __device__ __forceinline__ bool advance(Work& work) const {
    if (++work.step < work.end) return false;
    work.item += gridDim.x;
    if (!is_over(work)) enter(work);
    return true;
  }

  // The output that row `half * 8 + g` of fragment `tile` of this warp stands for. Where outputs
  // are gated, the rows of the second half are those of the second half of the outputs.
  __device__ __forceinline__ int output_of(const Work& work, int tile, int half) const {
    const int whole = (work.tile * S::across + across) * S::tiles + tile;
    if (args.activation == Activation::none) return whole * 16 + half * 8 + g;
    const int gate = whole * 8 + g;
    return gate < args.outputs / 2 ? half * (args.outputs / 2) + gate : args.outputs;
  }
  // Where a lane finds its part of a segment, and of the activations of its token: columns beyond
  // the last token repeat it, and are not stored.
  struct Places {
    int weight;
    int hidden[S::columns];
  };
  __device__ __forceinline__ Places places() const {
    Places found{W::place(g, t), {}};
#pragma unroll
    for (int column = 0; column < S::columns; ++column) {
      found.hidden[column] = W::Hidden::place(min(column * 8 + g, args.rows - 1), t);
    }
    return found;
  }
  __device__ __forceinline__ int input_of(const Work& work) const {
    return work.step * kBlockStep + along * W::kStepInputs;
  }

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
  // Of the group that ends with a subtile.
  __device__ __forceinline__ float half_of(const uint2& halves, int subtile) const {
    uint32_t half = subtile % 2 == 0 ? halves.x : halves.x >> 16;
    if (subtile >= 2) half = subtile == 2 ? halves.y : halves.y >> 16;
    if (subtile == 1 && args.group_shift == 6) half = halves.x;
    if (subtile == 3 && args.group_shift == 6) half = halves.x >> 16;
    if (subtile == 3 && args.group_shift == 7) half = halves.x;
    return unpack_fp16(half).x;
  }

  // sums += what a stage holds.
  __device__ __forceinline__ void multiply(int stage, const Groups& groups, const Places& places,
                                           Sum (&sums)[S::tiles][S::columns][4]) const {
    const unsigned char* weights = weights_of(stage);
    const unsigned char* hidden = hidden_of(stage);
    // Sums of a group of operands, and of what is taken off them (linear_weights.h).
    Sum part[S::tiles][S::columns][4] = {};
    float rest[S::columns][4] = {};
#pragma unroll
    for (int subtile = 0; subtile < W::kSegments * W::kSubtiles; ++subtile) {
      uint32_t a[S::tiles][2][4];
#pragma unroll
      for (int tile = 0; tile < S::tiles; ++tile) {
        const int segment = tile * 2 * W::kSegments + subtile / W::kSubtiles;
        W::weights(a[tile], weights + segment * kSegmentBytes, places.weight,
                   W::kSegments * kSegmentBytes, subtile % W::kSubtiles);
      }
#pragma unroll
      for (int column = 0; column < S::columns; ++column) {
        uint32_t b[2][2];
        W::Hidden::read(b, hidden, places.hidden[column], subtile);
#pragma unroll
        for (int product = 0; product < 2; ++product) {
#pragma unroll
          for (int tile = 0; tile < S::tiles; ++tile) {
            W::Unit::mma((W::kGrouped ? part : sums)[tile][column], a[tile][product], b[product]);
          }
          if constexpr (W::kGrouped) {
            if (W::kCentred && args.minima == nullptr) continue;
            const uint32_t offset = W::offset(product, args.minima == nullptr);
            const uint32_t taken[4] = {offset, W::kOne, offset, W::kOne};
            W::Unit::mma(rest[column], taken, b[product]);
          }
        }
      }
      if constexpr (W::kGrouped) {
        const bool ends = subtile == 3 || (subtile == 1 && args.group_shift < 7) ||
                          (subtile % 2 == 0 && args.group_shift < 6);
        if (ends) scale(groups, subtile, part, rest, sums);
      }
    }
  }

  // sums += scale * (part - offsets) + minimum * activations, for the group that ends with
  // `subtile`; then part and rest are 0.
  __device__ __forceinline__ void scale(const Groups& groups, int subtile,
                                        Sum (&part)[S::tiles][S::columns][4],
                                        float (&rest)[S::columns][4],
                                        Sum (&sums)[S::tiles][S::columns][4]) const {
#pragma unroll
    for (int row = 0; row < S::tiles * 2; ++row) {
      const float s = half_of(groups.scales[row], subtile);
#pragma unroll
      for (int column = 0; column < S::columns; ++column) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = row % 2 * 2 + i;
          sums[row / 2][column][at] += s * (part[row / 2][column][at] - rest[column][i]);
          part[row / 2][column][at] = 0.0f;
        }
      }
    }
    if (args.minima != nullptr) {
#pragma unroll
      for (int row = 0; row < S::tiles * 2; ++row) {
        const float minimum = half_of(groups.minima[row], subtile);
#pragma unroll
        for (int i = 0; i < S::columns * 2; ++i) {
          sums[row / 2][i / 2][row % 2 * 2 + i % 2] += minimum * rest[i / 2][2 + i % 2];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < S::columns * 4; ++i) rest[i / 4][i % 4] = 0.0f;
  }

  struct alignas(16) Fragment {
    Sum of[4];
  };

  // Add up what the warps that split the inputs have, and store it or keep it as a part.
  __device__ __forceinline__ void finish(const Work& work,
                                         Sum (&sums)[S::tiles][S::columns][4]) const {
    Fragment* others = reinterpret_cast<Fragment*>(shared + S::stages * stage_bytes);
    // Those of the tile before have been read.
    __syncthreads();
    if (along > 0) {
      Fragment* own = others + ((along - 1) * S::across + across) * kFragments * 32 + lane;
#pragma unroll
      for (int i = 0; i < kFragments; ++i) {
        Fragment fragment;
#pragma unroll
        for (int j = 0; j < 4; ++j) fragment.of[j] = sums[i / S::columns][i % S::columns][j];
        own[i * 32] = fragment;
      }
    }
    __syncthreads();
    if (along > 0) return;
    for (int other = 1; other < S::along; ++other) {
      const Fragment* from = others + ((other - 1) * S::across + across) * kFragments * 32 + lane;
#pragma unroll
      for (int i = 0; i < kFragments; ++i) {
        const Fragment fragment = from[i * 32];
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i / S::columns][i % S::columns][j] += fragment.of[j];
      }
    }
    if (args.splits > 1 && !gather(work, sums)) return;
#pragma unroll
    for (int tile = 0; tile < S::tiles; ++tile) {
      const int low = output_of(work, tile, 0), high = output_of(work, tile, 1);
#pragma unroll
      for (int column = 0; column < S::columns; ++column) {
        store(args, low, high, column * 8 + 2 * t, sums[tile][column]);
      }
    }
  }

  // Keep a split's sums; of the warp that comes last for a tile they become those of all splits,
  // added up in their order, and it returns true.
  __device__ __forceinline__ bool gather(const Work& work,
                                         Sum (&sums)[S::tiles][S::columns][4]) const {
    const int tile = work.tile * S::across + across;
    float4* parts = reinterpret_cast<float4*>(args.partials) +
                    int64_t(tile) * args.splits * kFragments * 32 + lane;
    float4* own = parts + (work.item - work.tile * args.splits) * kFragments * 32;
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
      const Sum(&from)[4] = sums[i / S::columns][i % S::columns];
      __stcg(own + i * 32, float4{float(from[0]), float(from[1]), float(from[2]), float(from[3])});
    }
    __threadfence();
    __syncwarp();
    int before = 0;
    if (lane == 0) before = atomicAdd(args.arrived + tile, 1);
    if (__shfl_sync(0xffffffffu, before, 0) != args.splits - 1) return false;
    __threadfence();
    if (lane == 0) args.arrived[tile] = 0;
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
      float total[4] = {};
      for (int split = 0; split < args.splits; ++split) {
        const float4 from = __ldcg(parts + (split * kFragments + i) * 32);
        total[0] += from.x;
        total[1] += from.y;
        total[2] += from.z;
        total[3] += from.w;
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i / S::columns][i % S::columns][j] = Sum(total[j]);
    }
    return true;
  }

  __device__ __forceinline__ void run() const {
    // The next kernel may come as soon as blocks leave; before this one has ended it reads nothing
    // but weights (ptx.h).
    grid_dependency_launch();
    Work current = first();
    Source next{current, {}, nullptr, 0};
    aim(next);
    const Source ahead = next;
#pragma unroll
    for (int stage = 0; stage < S::stages - 1; ++stage) {
      fetch_weights(next, stage);
      cp_async_commit();
      advance(next);
    }
    GroupSource of_groups{};
    Groups groups{}, later{};
    aim(of_groups, current);
    if (kScalesAhead) fetch_groups(of_groups, groups);
    grid_dependency_wait();
    bring_hidden(ahead);
    const Places places = this->places();
    Sum sums[S::tiles][S::columns][4] = {};
    int stage = 0, free = S::stages - 1;
#pragma unroll 1
    while (!is_over(current)) {
      cp_async_wait<S::stages - 2>();
      if constexpr (S::across > 1) {
        __syncthreads();
      } else {
        __syncwarp();
      }
      fetch_weights(next, free);
      fetch_hidden(next, free);
      cp_async_commit();
      advance(next);
      const Work now = current;
      const bool is_last = advance(current);
      if (!kScalesAhead) fetch_groups(of_groups, groups);
      advance(of_groups, current, is_last);
      if (kScalesAhead && !is_over(current)) fetch_groups(of_groups, later);
      multiply(stage, groups, places, sums);
      if (is_last) {
        finish(now, sums);
#pragma unroll
        for (int i = 0; i < kFragments; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[i / S::columns][i % S::columns][j] = 0;
        }
      }
      if (kScalesAhead) groups = later;
      stage = stage + 1 == S::stages ? 0 : stage + 1;
      free = free + 1 == S::stages ? 0 : free + 1;
    }
    cp_async_wait<0>();
  }
};

template <typename W, typename S>
__global__ void __launch_bounds__(S::threads, S::resident) linear_kernel(const LinearArgs args) {
  LinearKernel<W, S>(args).run();
}

template <typename W, typename S>
int32_t start_linear(const LinearArgs& args, cudaStream_t stream, LinearNeeds* needs) {
  using Kernel = LinearKernel<W, S>;
  const int bytes = Kernel::shared_bytes(args.rows);
  const int items = Kernel::tiles_of(args) * args.splits;
  if (needs != nullptr) {
    *needs = {bytes, S::outputs, Kernel::steps_of(args),
              items * S::across * Kernel::kFragments * 128};
    return cudaSuccess;
  }
  // As many blocks as are resident at a time, each for several tiles if there are more. Beside a
  // block's own memory a multiprocessor keeps 1 KB for it.
  const int resident = std::clamp(args.multiprocessor_bytes / (bytes + 1024), 1, S::resident);
  const Launch how{dim3(std::min(items, args.multiprocessors * resident)), dim3(S::threads),
                   size_t(bytes), stream, true};
  return launch(linear_kernel<W, S>, how, args);
}

// For few tokens each warp has 16 or 32 outputs and a part of the inputs to itself. For more, warps
// share the activations, or these would take more of the cache than the weights. A block's shared
// memory is at most 99 KB, which every card from Ampere on has, but for 17 rows and more.
template <typename Few, typename Many, int tiles, int stages, typename Wide, typename Widest>
int32_t linear_of_rows(const LinearArgs& args, cudaStream_t stream, LinearNeeds* needs) {
  if (args.rows <= 8) return start_linear<Few, Shape<tiles, 1, 1, 8, stages>>(args, stream, needs);
  if (args.rows <= 16) return start_linear<Few, Shape<2, 2, 1, 4, 4>>(args, stream, needs);
  if (args.rows <= 32) return start_linear<Many, Wide>(args, stream, needs);
  if (args.rows <= 64) return start_linear<Many, Widest>(args, stream, needs);
  return cudaErrorInvalidValue;
}

}  // namespace meshserve
