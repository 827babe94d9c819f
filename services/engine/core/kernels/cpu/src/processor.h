// What a processor says of itself, and the instruction sets that follow from it.
#pragma once

#include <cstdint>

namespace meshserve {

// Answers of CPUID, by leaf and register, and which register files the operating system saves when
// it switches threads (XCR0). Bits as in Intel's Software Developer's Manual, volume 2, CPUID, and
// volume 1, chapter 13; what is not there is 0.
struct Processor {
  uint32_t leaf1_ecx;
  uint32_t leaf7_ebx, leaf7_ecx, leaf7_edx;
  uint32_t leaf7_1_eax;
  uint64_t saved;
};

// The instruction sets that can be used, the best one first, separated by spaces.
inline const char* isa_names(const Processor& processor) {
  const auto has = [](uint64_t word, uint64_t bits) { return (word & bits) == bits; };
  const auto bit = [](int index) { return uint64_t{1} << index; };
  const uint64_t fma = bit(12), osxsave = bit(27), avx = bit(28), f16c = bit(29);
  const uint64_t ymm = bit(1) | bit(2), zmm = ymm | bit(5) | bit(6) | bit(7);
  const uint64_t tiles = bit(17) | bit(18);  // their configuration, and what is in them
  if (!has(processor.leaf1_ecx, fma | osxsave | avx | f16c) || !has(processor.saved, ymm))
    return "";
  const uint64_t avx2 = bit(5);
  if (!has(processor.leaf7_ebx, avx2)) return "";
  const uint64_t foundation = bit(16), dq = bit(17), bw = bit(30), vl = bit(31), vnni = bit(11);
  if (!has(processor.saved, zmm) || !has(processor.leaf7_ecx, vnni) ||
      !has(processor.leaf7_ebx, foundation | dq | bw | vl)) {
    return "avx2";
  }
  const uint64_t vbmi = bit(1), avx512_bf16 = bit(5);
  if (!has(processor.leaf7_ecx, vbmi) || !has(processor.leaf7_1_eax, avx512_bf16)) {
    return "avx512 avx2";
  }
  const uint64_t amx_bf16 = bit(22), amx_tile = bit(24), amx_int8 = bit(25);
  if (!has(processor.leaf7_edx, amx_bf16 | amx_tile | amx_int8) || !has(processor.saved, tiles)) {
    return "avx512bf16 avx512 avx2";
  }
  return "amx avx512bf16 avx512 avx2";
}

}  // namespace meshserve
