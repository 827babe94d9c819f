// Sixteen 32-bit sums of products of bytes, on every instruction set.
#pragma once

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
// sums + the four products of each lane: unsigned bytes by the four signed bytes of `b`.
inline Integers add_byte_products(Integers sums, Bytes a, int32_t b) {
  return _mm512_dpbusd_epi32(sums, a, _mm512_set1_epi32(b));
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
inline Integers add_byte_products(Integers sums, Bytes a, int32_t b) {
  const __m256i four = _mm256_set1_epi32(b);
  return {detail::add_byte_products(sums.low, a.low, four),
          detail::add_byte_products(sums.high, a.high, four)};
}

#endif

}  // namespace meshserve::MESHSERVE_ISA
