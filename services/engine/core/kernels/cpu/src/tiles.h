// The tiles of Intel AMX: eight matrices of a thread, of up to 16 rows of 64 bytes, and the product
// of two of them (Intel's Software Developer's Manual, volume 2, and volume 1, chapter 18).
//
// Of a product, row m of C gets row m of A times B: C[m][n] += A[m][k] * B[k][n], where an element
// of A and B is four bytes or a pair of bf16, and one of C their sum in 32 bits. So a row of A is a
// row of activations, and B is how packed weights lie in memory anyway.
//
// Written in assembly: the compilers' own functions do not say that they read and write memory.
#pragma once

#include <cstdint>

namespace meshserve::MESHSERVE_ISA {

constexpr int max_tile_rows = 16;

// The shapes of all tiles, as LDTILECFG reads them.
struct alignas(64) TileShapes {
  uint8_t palette = 1;  // the only one: eight tiles of up to 16 rows of 64 bytes
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int tile_rows, int tile_row_bytes) {
    rows[tile] = static_cast<uint8_t>(tile_rows);
    row_bytes[tile] = static_cast<uint16_t>(tile_row_bytes);
  }
};

// Gives this thread's tiles their shapes for as long as it lives. Tiles that nobody holds cost
// nothing when threads are switched, and do not keep a core from sleeping.
class Tiles {
 public:
  explicit Tiles(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

template <int tile>
inline void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(tile), "r"(from), "r"(stride) : "memory");
}

template <int tile>
inline void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(tile), "r"(to), "r"(stride) : "memory");
}

template <int tile>
inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}

// c += a * b of signed bytes by unsigned ones, in 32 bits, exact.
template <int c, int a, int b>
inline void add_tile_of_bytes() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

// c += a * b of pairs of bf16. First and second members have sums of their own, in the order of k
// and rounded after each product; then their sum is added to c. Subnormal numbers count as 0, and
// become 0.
template <int c, int a, int b>
inline void add_tile_of_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

}  // namespace meshserve::MESHSERVE_ISA
