// Chooses among the instruction sets that were compiled those that this machine has.
#include <cpuid.h>

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace meshserve {

namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512bf16 {
extern const Kernels kernels;
}

namespace {

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers read;
  // Leaves beyond the last one of the processor leave the registers at zero: no features.
  __get_cpuid_count(leaf, subleaf, &read.eax, &read.ebx, &read.ecx, &read.edx);
  return read;
}

// Which register files the operating system saves when it switches threads (XCR0).
uint64_t saved_state() {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

constexpr bool has(uint64_t word, uint64_t bits) { return (word & bits) == bits; }
constexpr uint32_t bit(int index) { return uint32_t{1} << index; }

// Bits as in Intel's Software Developer's Manual, volume 2, CPUID, and volume 1, chapter 13.
struct Machine {
  bool avx2 = false, avx512 = false, avx512bf16 = false;

  Machine() {
    const Registers basic = cpuid(1, 0);
    constexpr uint32_t fma = bit(12), osxsave = bit(27), avx = bit(28), f16c = bit(29);
    if (!has(basic.ecx, fma | osxsave | avx | f16c)) return;
    const uint64_t saved = saved_state();
    const Registers extended = cpuid(7, 0);
    constexpr uint64_t ymm = 0x6, zmm = 0xe6;
    avx2 = has(saved, ymm) && has(extended.ebx, bit(5));
    constexpr uint32_t foundation = bit(16), dq = bit(17), bw = bit(30), vl = bit(31);
    constexpr uint32_t vbmi = bit(1), vnni = bit(11);
    avx512 = avx2 && has(saved, zmm) && has(extended.ebx, foundation | dq | bw | vl) &&
             has(extended.ecx, vnni);
    avx512bf16 = avx512 && has(extended.ecx, vbmi) && has(cpuid(7, 1).eax, bit(5));
  }
};

}  // namespace
}  // namespace meshserve

extern "C" {

// The instruction sets that this machine has, the best one first, separated by spaces.
[[gnu::visibility("default")]] const char* meshserve_isa_names() {
  const meshserve::Machine machine;
  if (machine.avx512bf16) return "avx512bf16 avx512 avx2";
  if (machine.avx512) return "avx512 avx2";
  return machine.avx2 ? "avx2" : "";
}

// The kernels of a named instruction set; null where the machine lacks it or nobody knows it.
[[gnu::visibility("default")]] const meshserve::Kernels* meshserve_kernels(const char* isa) {
  const meshserve::Machine machine;
  if (machine.avx2 && !std::strcmp(isa, "avx2")) return &meshserve::avx2::kernels;
  if (machine.avx512 && !std::strcmp(isa, "avx512")) return &meshserve::avx512::kernels;
  if (machine.avx512bf16 && !std::strcmp(isa, "avx512bf16")) return &meshserve::avx512bf16::kernels;
  return nullptr;
}

}  // extern "C"
