// The functions of ptx.h as the PTX manual describes their instructions.
#pragma once

#include <cmath>
#include <cstring>

#include "cuda_runtime.h"

namespace meshserve {

inline unsigned char* dynamic_shared() { return emulated::shared_memory(); }

}  // namespace meshserve

namespace emulated {

inline float bf16_to_float(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }

inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (std::isnan(value)) return 0x7fff;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float fp16_to_float(uint16_t bits) { return float(std::bit_cast<_Float16>(bits)); }
inline uint16_t float_to_fp16(float value) { return std::bit_cast<uint16_t>(_Float16(value)); }

inline float e4m3_to_float(uint8_t bits) {
  const int exponent = bits >> 3 & 0xf, mantissa = bits & 7;
  float value = exponent == 0 ? std::ldexp(float(mantissa), -9)
                              : std::ldexp(1.0f + float(mantissa) / 8.0f, exponent - 7);
  if (exponent == 15 && mantissa == 7) value = NAN;
  return bits & 0x80 ? -value : value;
}

template <typename Sum>
struct Fragments {
  Sum* d;
  const uint32_t *a, *b;
};

// Row, or column, of the element `index` of a lane's fragment: 4 / `size` elements of `size` bytes
// to a register. a: registers 0 and 2 hold rows lane / 4, 1 and 3 those 8 further down; registers 2
// and 3 hold columns of the second half of k.
inline int row_of_a(int lane, int element, int size) {
  return lane / 4 + (element / (4 / size) & 1) * 8;
}
inline int column_of_a(int lane, int element, int size) {
  const int each = 4 / size;
  return lane % 4 * each + element % each + element / each / 2 * (4 * each);
}
inline int row_of_b(int lane, int element, int size) {
  const int each = 4 / size;
  return lane % 4 * each + element % each + element / each * (4 * each);
}

// Sums exactly enough: in double, or in integers, from the accumulator on.
template <typename Wide, int size, typename Sum, typename Convert>
void multiply(Fragments<Sum>* const* lanes, Convert convert) {
  constexpr int depth = 32 / size, each = 4 / size;
  Wide a[16][depth], b[depth][8];
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4 * each; ++i) {
      a[row_of_a(lane, i, size)][column_of_a(lane, i, size)] =
          convert(lanes[lane]->a[i / each] >> i % each * 8 * size);
    }
    for (int i = 0; i < 2 * each; ++i) {
      b[row_of_b(lane, i, size)][lane / 4] =
          convert(lanes[lane]->b[i / each] >> i % each * 8 * size);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      Wide sum = lanes[lane]->d[i];
      for (int k = 0; k < depth; ++k) sum += a[row][k] * b[k][column];
      lanes[lane]->d[i] = Sum(sum);
    }
  }
}

template <typename Wide, int size, typename Sum, typename Convert>
void mma(Sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* what, Convert) {
  Fragments<Sum> own{d, a, b};
  together(0xffffffffu, what, own,
           [](Fragments<Sum>* const* lanes, uint32_t) { multiply<Wide, size>(lanes, Convert{}); });
}

struct Matrices {
  const unsigned char* row;
  uint32_t* registers;
};

template <int count>
void ldmatrix(uint32_t (&r)[count], const void* row, bool transposed) {
  const auto* address = static_cast<const unsigned char*>(row);
  Matrices own{address, r};
  if (self->lane < 8 * count) check_shared(aligned(address, 16), 16);
  const auto load = [](Matrices* const* lanes, bool across) {
    for (int i = 0; i < count; ++i) {
      uint32_t banks = 0;  // in groups of 16 bytes
      for (int r = 0; r < 8; ++r) {
        banks |= 1u << reinterpret_cast<uintptr_t>(lanes[8 * i + r]->row) / 16 % 8;
      }
      bank_conflicts += size_t(8 - std::popcount(banks));
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < count; ++i) {
        uint16_t halves[2];
        for (int h = 0; h < 2; ++h) {
          const int place = 2 * (lane % 4) + h;
          const int from_row = across ? place : lane / 4, column = across ? lane / 4 : place;
          memcpy(&halves[h], lanes[8 * i + from_row]->row + 2 * column, 2);
        }
        lanes[lane]->registers[i] = uint32_t(halves[1]) << 16 | halves[0];
      }
    }
  };
  if (transposed) {
    together(0xffffffffu, "ldmatrix.trans", own,
             [load](Matrices* const* lanes, uint32_t) { load(lanes, true); });
  } else {
    together(0xffffffffu, "ldmatrix", own,
             [load](Matrices* const* lanes, uint32_t) { load(lanes, false); });
  }
}

}  // namespace emulated

namespace meshserve {

inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::mma<double, 2>(d, a, b, "mma.m16n8k16.bf16",
                           [](uint32_t bits) { return emulated::bf16_to_float(uint16_t(bits)); });
}
inline void mma_m16n8k16_fp16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::mma<double, 2>(d, a, b, "mma.m16n8k16.fp16",
                           [](uint32_t bits) { return emulated::fp16_to_float(uint16_t(bits)); });
}
inline void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::mma<int64_t, 1>(d, a, b, "mma.m16n8k32.s8",
                            [](uint32_t bits) { return int64_t(int8_t(bits)); });
}
inline void mma_m16n8k32_e4m3(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::mma<double, 1>(d, a, b, "mma.m16n8k32.e4m3",
                           [](uint32_t bits) { return emulated::e4m3_to_float(uint8_t(bits)); });
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { emulated::ldmatrix(r, row, false); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  emulated::ldmatrix(r, row, true);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row) { emulated::ldmatrix(r, row, false); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  emulated::ldmatrix(r, row, true);
}

inline uint32_t movmatrix_trans(uint32_t pair) {
  struct Exchanged {
    uint32_t mine, received;
  } own{pair, 0};
  emulated::together(0xffffffffu, "movmatrix", own, [](Exchanged* const* lanes, uint32_t) {
    const auto element = [lanes](int row, int column) {
      return lanes[4 * row + column / 2]->mine >> 16 * (column % 2) & 0xffff;
    };
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      lanes[lane]->received = element(column, row) | element(column + 1, row) << 16;
    }
  });
  return own.received;
}

inline void cp_async_16(void* shared, const void* global, bool present) {
  emulated::copy_later(shared, global, 16, present);
}
inline void cp_async_4(void* shared, const void* global, bool present) {
  emulated::copy_later(shared, global, 4, present);
}
inline void cp_async_commit() { emulated::commit_copies(); }
template <int pending>
void cp_async_wait() {
  emulated::wait_for_copies(pending);
}

inline uint4 load_16_streaming(const void* global) {
  return *emulated::aligned(static_cast<const uint4*>(global));
}
// Where others write meanwhile, whoever reads lets them have their turn.
inline void store_16_system(void* global, const uint4& value) {
  auto* words = reinterpret_cast<uint32_t*>(emulated::aligned(static_cast<uint4*>(global)));
  const uint32_t all[4] = {value.x, value.y, value.z, value.w};
  for (int i = 0; i < 4; ++i) emulated::store_later(words + i, all[i]);
}
inline uint4 load_16_system(const void* global) {
  emulated::pause();
  return *emulated::aligned(static_cast<const uint4*>(global));
}
inline void store_4_system(void* global, uint32_t value) {
  emulated::store_later(emulated::aligned(static_cast<uint32_t*>(global)), value);
}
inline uint32_t load_4_system(const void* global) {
  return *emulated::aligned(static_cast<const uint32_t*>(global));
}
inline uint64_t time_ns() { return emulated::time_ns(); }
inline void trap() { emulated::fail(emulated::kLaunchFailure, "a trap"); }

inline void prefetch_l2(const void*) {}
inline void grid_dependency_wait() { emulated::end_earlier(); }
inline void grid_dependency_launch() {}

inline uint32_t pack_bf16(float low, float high) {
  return uint32_t(emulated::float_to_bf16(high)) << 16 | emulated::float_to_bf16(low);
}
inline uint32_t pack_fp16(float low, float high) {
  return uint32_t(emulated::float_to_fp16(high)) << 16 | emulated::float_to_fp16(low);
}
inline float2 unpack_fp16(uint32_t packed) {
  return {emulated::fp16_to_float(uint16_t(packed)),
          emulated::fp16_to_float(uint16_t(packed >> 16))};
}

// In double, where neither the product nor, of these widths, the sum is rounded before the end.
inline uint32_t fma_fp16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t packed = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const double product = double(emulated::fp16_to_float(uint16_t(a >> shift))) *
                           double(emulated::fp16_to_float(uint16_t(b >> shift)));
    const double sum = product + double(emulated::fp16_to_float(uint16_t(c >> shift)));
    packed |= uint32_t(std::bit_cast<uint16_t>(_Float16(sum))) << shift;
  }
  return packed;
}
inline uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t packed = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    packed |=
        uint32_t(emulated::float_to_bf16(std::fma(emulated::bf16_to_float(uint16_t(a >> shift)),
                                                  emulated::bf16_to_float(uint16_t(b >> shift)),
                                                  emulated::bf16_to_float(uint16_t(c >> shift)))))
        << shift;
  }
  return packed;
}

inline uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) { return (a & mask) | bits; }

inline float exp2_approximate(float x) { return std::exp2(x); }
inline float tanh_approximate(float x) { return std::tanh(x); }

}  // namespace meshserve
