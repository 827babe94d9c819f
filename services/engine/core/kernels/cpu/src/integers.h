// Sixteen 32-bit sums of products of bytes, on every instruction set.
#pragma once

#include <initializer_list>

#include "simd.h"

namespace meshserve::MESHSERVE_ISA {

#if defined(__AVX512F__)

using Integers = __m512i;
using Bytes = __m512i;  // 16 lanes of four unsigned bytes

inline Integers broadcast_integer(int32_t a) { return _mm512_set1_epi32(a); }
inline Floats to_floats(Integers a) { return _mm512_cvtepi32_ps(a); }
inline Bytes load_bytes(const uint8_t* from) { return _mm512_loadu_si512(from); }
inline Bytes low_nibbles(Bytes a) { return _mm512_and_si512(a, _mm512_set1_epi8(0x0f)); }
inline Bytes high_nibbles(Bytes a) {
  return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(0x0f));
}
// Sixteen halves (IEEE binary16) as floats.
inline Floats load_halves(const uint16_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
// The four bytes at `from`, in all lanes.
inline Bytes broadcast_bytes(const int8_t* from) {
  int32_t four;
  std::memcpy(&four, from, sizeof four);
  return _mm512_set1_epi32(four);
}
// sums + the four products of each lane: unsigned bytes of `a` by signed ones of `b`.
inline Integers add_byte_products(Integers sums, Bytes a, Bytes b) {
  return _mm512_dpbusd_epi32(sums, a, b);
}

// The largest magnitude of both; infinity or NaN if any of them is one of these.
inline float largest_magnitude(Floats a, Floats b) {
  // Magnitudes compare as integers do, with infinity above all numbers and NaN above infinity.
  const __m512i mask = _mm512_set1_epi32(0x7fffffff);
  const __m512i first = _mm512_and_si512(_mm512_castps_si512(a), mask);
  const __m512i second = _mm512_and_si512(_mm512_castps_si512(b), mask);
  const int32_t bits = _mm512_reduce_max_epi32(_mm512_max_epi32(first, second));
  float largest;
  std::memcpy(&largest, &bits, sizeof largest);
  return largest;
}
// Writes 32 values, rounded, as signed bytes; returns their sum.
inline int32_t store_levels(int8_t* to, Floats a, Floats b) {
  const __m512i first = _mm512_cvtps_epi32(a), second = _mm512_cvtps_epi32(b);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtsepi32_epi8(first));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to + lanes), _mm512_cvtsepi32_epi8(second));
  return _mm512_reduce_add_epi32(_mm512_add_epi32(first, second));
}

#else

struct Integers {
  __m256i low, high;
};
using Bytes = Integers;

inline Integers broadcast_integer(int32_t a) {
  return {_mm256_set1_epi32(a), _mm256_set1_epi32(a)};
}
inline Floats to_floats(Integers a) {
  return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)};
}
inline Bytes load_bytes(const uint8_t* from) {
  const auto* halves = reinterpret_cast<const __m256i*>(from);
  return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}
inline Bytes low_nibbles(Bytes a) {
  const __m256i mask = _mm256_set1_epi8(0x0f);
  return {_mm256_and_si256(a.low, mask), _mm256_and_si256(a.high, mask)};
}
inline Bytes high_nibbles(Bytes a) {
  const __m256i mask = _mm256_set1_epi8(0x0f);
  return {_mm256_and_si256(_mm256_srli_epi16(a.low, 4), mask),
          _mm256_and_si256(_mm256_srli_epi16(a.high, 4), mask)};
}
inline Floats load_halves(const uint16_t* from) {
  const auto* halves = reinterpret_cast<const __m128i*>(from);
  return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}
namespace detail {
inline __m256i add_byte_products(__m256i sums, __m256i a, __m256i b) {
  // Sums of two products in 16 bits would saturate, so even and odd bytes are multiplied apart.
  const __m256i ones = _mm256_set1_epi16(1);
  const __m256i even = _mm256_maddubs_epi16(_mm256_and_si256(a, _mm256_set1_epi16(0xff)), b);
  const __m256i odd = _mm256_maddubs_epi16(_mm256_andnot_si256(_mm256_set1_epi16(0xff), a), b);
  const __m256i pairs =
      _mm256_add_epi32(_mm256_madd_epi16(even, ones), _mm256_madd_epi16(odd, ones));
  return _mm256_add_epi32(sums, pairs);
}
}  // namespace detail
inline Bytes broadcast_bytes(const int8_t* from) {
  int32_t four;
  std::memcpy(&four, from, sizeof four);
  return broadcast_integer(four);
}
inline Integers add_byte_products(Integers sums, Bytes a, Bytes b) {
  return {detail::add_byte_products(sums.low, a.low, b.low),
          detail::add_byte_products(sums.high, a.high, b.high)};
}

inline float largest_magnitude(Floats a, Floats b) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  __m256i eight = _mm256_setzero_si256();
  for (const __m256 part : {a.low, a.high, b.low, b.high}) {
    eight = _mm256_max_epi32(eight, _mm256_and_si256(_mm256_castps_si256(part), mask));
  }
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
  const int32_t bits = _mm_cvtsi128_si32(four);
  float largest;
  std::memcpy(&largest, &bits, sizeof largest);
  return largest;
}
inline int32_t store_levels(int8_t* to, Floats a, Floats b) {
  __m256i eight = _mm256_setzero_si256();
  for (const __m256 part : {a.low, a.high, b.low, b.high}) {
    eight = _mm256_add_epi32(eight, _mm256_cvtps_epi32(part));
  }
  store_int8(to, a);
  store_int8(to + lanes, b);
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1));
  return _mm_cvtsi128_si32(four);
}

#endif

// Asks for the cache line at `from` before it is needed.
inline void prefetch(const void* from) {
  _mm_prefetch(static_cast<const char*>(from), _MM_HINT_T0);
}

}  // namespace meshserve::MESHSERVE_ISA
