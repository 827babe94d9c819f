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

// 64 int8 as bf16, in their order. Both bytes of each are looked up by its magnitude.
inline void expand_int8(__m512i integers, __m512i& first, __m512i& second) {
  const __m512i low_first = _mm512_load_si512(low_bytes.data());
  const __m512i low_second = _mm512_load_si512(low_bytes.data() + 64);
  const __m512i high_first = _mm512_load_si512(high_bytes.data());
  const __m512i high_second = _mm512_load_si512(high_bytes.data() + 64);
  // Interleaving works within quarters: the first half's eights go where it takes the lower ones.
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  const __m512i ordered = _mm512_permutexvar_epi64(order, integers);
  const __m512i magnitudes = _mm512_abs_epi8(ordered);
  const __m512i low = _mm512_permutex2var_epi8(low_first, magnitudes, low_second);
  const __m512i unsigned_high = _mm512_permutex2var_epi8(high_first, magnitudes, high_second);
  // (ordered & sign) | unsigned_high
  const __m512i high =
      _mm512_ternarylogic_epi64(ordered, _mm512_set1_epi8(-128), unsigned_high, 0xea);
  first = _mm512_unpacklo_epi8(low, high);
  second = _mm512_unpackhi_epi8(low, high);
}

// The int8 at `from` as pairs of bf16: 32 of them, and 64.
inline Pairs load_pairs(const int8_t* from) {
  const auto* bytes = reinterpret_cast<const __m256i*>(from);
  __m512i first, second;
  expand_int8(_mm512_castsi256_si512(_mm256_loadu_si256(bytes)), first, second);
  return first;
}
inline void load_two_pairs(const int8_t* from, Pairs& first, Pairs& second) {
  expand_int8(_mm512_loadu_si512(from), first, second);
}

// `count` is a multiple of 64.
inline void expand_int8(const int8_t* from, int32_t count, uint16_t* to) {
  for (int32_t i = 0; i < count; i += 64) {
    __m512i first, second;
    expand_int8(_mm512_loadu_si512(from + i), first, second);
    _mm512_storeu_si512(to + i, first);
    _mm512_storeu_si512(to + i + 32, second);
  }
}

#else

// The 32 int8 at `from` as pairs of floats.
inline Pairs load_pairs(const int8_t* from) {
#if defined(__AVX512F__)
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  const __m512i both = _mm512_cvtepi16_epi32(bytes);
  const __m512i first = _mm512_srai_epi32(_mm512_slli_epi32(both, 24), 24);
  return {_mm512_cvtepi32_ps(first), _mm512_cvtepi32_ps(_mm512_srai_epi32(both, 8))};
#else
  const auto expand = [](const int8_t* eight_pairs, __m256& first, __m256& second) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(eight_pairs));
    const __m256i both = _mm256_cvtepi16_epi32(bytes);
    first = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(both, 24), 24));
    second = _mm256_cvtepi32_ps(_mm256_srai_epi32(both, 8));
  };
  Pairs pairs;
  expand(from, pairs.first.low, pairs.second.low);
  expand(from + 16, pairs.first.high, pairs.second.high);
  return pairs;
#endif
}

inline void load_two_pairs(const int8_t* from, Pairs& first, Pairs& second) {
  first = load_pairs(from);
  second = load_pairs(from + 2 * lanes);
}

// `count` is a multiple of 16.
inline void expand_int8(const int8_t* from, int32_t count, uint16_t* to) {
  for (int32_t i = 0; i < count; i += lanes) store_bf16(to + i, load_int8(from + i));
}

#endif

// The 64 bf16 at `from`.
inline void load_two_pairs(const uint16_t* from, Pairs& first, Pairs& second) {
  first = load_pairs(from);
  second = load_pairs(from + 2 * lanes);
}

}  // namespace meshserve::MESHSERVE_ISA
