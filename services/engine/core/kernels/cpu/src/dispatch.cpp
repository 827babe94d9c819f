// Hands out the kernels of the instruction sets that were compiled, and says which this machine
// has.
#include <cpuid.h>
#include <errno.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <initializer_list>

#include "kernels.h"
#include "processor.h"

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
namespace amx {
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

Processor this_processor() {
  const Registers leaf1 = cpuid(1, 0), leaf7 = cpuid(7, 0);
  Processor processor{leaf1.ecx, leaf7.ebx, leaf7.ecx, leaf7.edx, cpuid(7, 1).eax, 0};
  constexpr uint32_t osxsave = 1u << 27;
  if (leaf1.ecx & osxsave) {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    processor.saved = (uint64_t{high} << 32) | low;
  }
  return processor;
}

// Linux gives a process tiles on request alone, all its threads at once: they are 8 KiB more to be
// saved for each (Documentation/arch/x86/xstate.rst).
int request_tiles() {
  constexpr long arch_req_xcomp_perm = 0x1023, xfeature_xtiledata = 18;
  return syscall(SYS_arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata) == 0 ? 0 : errno;
}

// Some hypervisors show AMX and stop what uses it. So a child tries one tile, and ends for it.
int try_tiles() {
  const pid_t child = fork();
  if (child < 0) return errno;
  if (child == 0) {
    prctl(PR_SET_DUMPABLE, 0);
    alignas(64) uint8_t shapes[64] = {1};  // as tiles.h has them: one tile of 16 rows of 64 bytes
    shapes[16] = 64;
    shapes[48] = 16;
    asm volatile("ldtilecfg %0" ::"m"(shapes));
    asm volatile("tilezero %tmm0");
    asm volatile("tilerelease");
    _exit(0);
  }
  int status = 0;
  while (waitpid(child, &status, 0) < 0) {
    if (errno != EINTR) return errno;
  }
  return status == 0 ? 0 : ENOTSUP;
}

}  // namespace
}  // namespace meshserve

extern "C" {

// The instruction sets that this machine has, the best one first, separated by spaces.
[[gnu::visibility("default")]] const char* meshserve_isa_names() {
  return meshserve::isa_names(meshserve::this_processor());
}

// Asks the operating system for what an instruction set needs of it. Returns 0, or its error.
[[gnu::visibility("default")]] int meshserve_request(const char* isa) {
  if (std::strcmp(isa, "amx")) return 0;
  const int refused = meshserve::request_tiles();
  return refused ? refused : meshserve::try_tiles();
}

// Whether tiles can be used, found out by using one. Returns 0, or ENOTSUP.
[[gnu::visibility("default")]] int meshserve_try_tiles() { return meshserve::try_tiles(); }

// The kernels of a named instruction set, which the machine may not have; null where nobody knows
// it.
[[gnu::visibility("default")]] const meshserve::Kernels* meshserve_kernels(const char* isa) {
  for (const meshserve::Kernels* each : {&meshserve::amx::kernels, &meshserve::avx512bf16::kernels,
                                         &meshserve::avx512::kernels, &meshserve::avx2::kernels}) {
    if (!std::strcmp(each->isa, isa)) return each;
  }
  return nullptr;
}

}  // extern "C"
