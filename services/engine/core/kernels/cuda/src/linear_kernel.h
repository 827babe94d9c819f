// The kernel of linear.h, and how it is started.
#pragma once

#include <algorithm>

#include "linear_epilogue.h"
#include "linear_sources.h"

namespace meshserve {

template <typename W, typename S>
struct LinearKernel : LinearSources<W, S> {
  using Base = LinearSources<W, S>;
  using Base::Base;
  using Base::kFragments, Base::kScalesAhead, Base::args, Base::lane, Base::g, Base::t, Base::warp,
      Base::across, Base::along, Base::stage_bytes, Base::shared, Base::weights_of, Base::hidden_of,
      Base::first, Base::is_over, Base::advance, Base::output_of, Base::aim, Base::fetch_weights,
      Base::fetch_hidden, Base::bring_hidden, Base::fetch_groups;
  using typename Base::Sum, typename Base::Source, typename Base::Groups,
      typename Base::GroupSource;

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
