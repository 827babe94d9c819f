// Integers of int8 as bf16, which holds them exactly.
#pragma once

#include <array>
#include <bit>

#include "simd.h"

namespace meshserve::MESHSERVE_ISA {

#if defined(__AVX512VBMI__)

// The bytes, `shift` bits up, of the bf16 of the integers from 0 to 127.
constexpr std::array<uint8_t, 128> bytes_of_bf16(int shift) {
  std::array<uint8_t, 128> bytes = {};
  for (int i = 0; i < 128; ++i)
    bytes[static_cast<size_t>(i)] =
        static_cast<uint8_t>(std::bit_cast<uint32_t>(static_cast<float>(i)) >> (16 + shift));
  return bytes;
}

alignas(64) constexpr std::array<uint8_t, 128> low_bytes = bytes_of_bf16(0);
alignas(64) constexpr std::array<uint8_t, 128> high_bytes = bytes_of_bf16(8);

// `count` is a multiple of 64. Both bytes of a bf16 are looked up by the magnitude.
inline void expand_int8(const int8_t* from, int32_t count, uint16_t* to) {
  const __m512i low_first = _mm512_load_si512(low_bytes.data());
  const __m512i low_second = _mm512_load_si512(low_bytes.data() + 64);
  const __m512i high_first = _mm512_load_si512(high_bytes.data());
  const __m512i high_second = _mm512_load_si512(high_bytes.data() + 64);
  const __m512i sign = _mm512_set1_epi8(-128);
  // Interleaving works within quarters: the first half's eights go where it takes the lower ones.
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  for (int32_t i = 0; i < count; i += 64) {
    const __m512i integers = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(from + i));
    const __m512i magnitudes = _mm512_abs_epi8(integers);
    const __m512i low = _mm512_permutex2var_epi8(low_first, magnitudes, low_second);
    const __m512i unsigned_high = _mm512_permutex2var_epi8(high_first, magnitudes, high_second);
    // (integers & sign) | unsigned_high
    const __m512i high = _mm512_ternarylogic_epi64(integers, sign, unsigned_high, 0xea);
    _mm512_storeu_si512(to + i, _mm512_unpacklo_epi8(low, high));
    _mm512_storeu_si512(to + i + 32, _mm512_unpackhi_epi8(low, high));
  }
}

#else

// `count` is a multiple of 16.
inline void expand_int8(const int8_t* from, int32_t count, uint16_t* to) {
  for (int32_t i = 0; i < count; i += lanes) store_bf16(to + i, load_int8(from + i));
}

#endif

}  // namespace meshserve::MESHSERVE_ISA
