// Low-rank adapters of linear layers (Hu et al., arXiv:2106.09685): each sequence of a step may go
// through one of its own, which adds up * (down * input) to what the layer computes.
//
// Both matrices are bf16 in tiles of 16 outputs: [tiles][inputs / 2][16 outputs][2 inputs], their
// last tile padded with zeros. Each output is one sum in one order, whatever else is in the step.
#pragma once

#include <cstdint>
#include <vector>

#include "linear.h"

namespace meshserve {

// What an adapter adds to some outputs of a layer.
struct AdapterPart {
  const uint16_t* down;  // [rank, inputs]
  const uint16_t* up;    // [tiles * 16, rank], the adapter's scale included
  int32_t rank;          // a multiple of 16
  int32_t first_shrunk;  // where down * input goes, after those of other parts
  int32_t tiles;
  int32_t first_tile;  // of the layer's outputs, as they are packed
  int32_t tile_step;   // from one to the next: 2 where tiles of gates and values alternate
};

// What it does to one layer; most often nothing, or one part for each matrix of a merged layer.
struct AdapterLinear {
  const AdapterPart* parts;
  int32_t num_parts;
  int32_t rank_tiles;  // of all parts together
};

struct StepAdapters {
  const int32_t* of_sequence;          // [num_sequences]: its adapter, -1 for none
  const AdapterLinear* const* loaded;  // by adapter: [adapted layers]
};

}  // namespace meshserve

namespace meshserve::MESHSERVE_ISA {

// The rows of a step, or of a part of it, by adapter.
class AdapterRows {
 public:
  // Some rows of one adapter that are computed together.
  struct Block {
    int32_t adapter;  // -1: none
    const int32_t* rows;
    int32_t count;
  };

  // adapters: of each row, -1 for none.
  void sort(const int32_t* adapters, int32_t rows);

  bool any() const { return num_adapted_ > 0; }
  // Those of rows without an adapter come last.
  const std::vector<Block>& blocks() const { return blocks_; }
  int32_t num_adapted() const { return num_adapted_; }
  // The largest number of tiles of ranks that an adapter of these rows has at a layer; 0: none does
  // anything there.
  int32_t rank_tiles(const StepAdapters& adapters, int32_t layer) const;

 private:
  std::vector<int32_t> adapters_;  // in use, ascending
  std::vector<int32_t> rows_;
  std::vector<Block> blocks_;
  int32_t num_adapted_ = 0;  // of the blocks
};

// What adapters do at one layer to the rows of a step.
struct AdapterArgs {
  const AdapterRows* rows;
  const StepAdapters* adapters;
  int32_t layer;          // among those that adapters may change
  Activations input;      // of the layer
  char* shrunk;           // of the first row: down * input, as operands
  int64_t shrunk_stride;  // bytes
  float* sums;            // what the layer computed, in tiles as it is packed
  int64_t sums_stride;    // floats
  int32_t outputs;        // of the layer, a multiple of 16
  // What the layer's own epilogue would have made of complete sums, and where it goes.
  Epilogue epilogue;
  float* output;
  int64_t output_stride;
};

// Whether sums must be complete before a layer's epilogue.
inline bool follows_adapters(Epilogue epilogue) {
  return gates(epilogue) || epilogue == Epilogue::gelu;
}

// Bytes of scratch memory that `shrink_run` takes.
size_t shrink_scratch_bytes(int32_t inputs);

// shrunk = down * input
int shrink_tasks(const AdapterArgs& args);
void shrink_run(const AdapterArgs& args, int task, void* scratch);

// sums += up * shrunk, and the epilogue where it follows.
int expand_tasks(const AdapterArgs& args);
void expand_run(const AdapterArgs& args, int task);

}  // namespace meshserve::MESHSERVE_ISA
