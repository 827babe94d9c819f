// What the machine can do at most: bytes read from memory and products computed, all threads at
// once. Prints one line "NAME VALUE" each: read (GB/s), float, bf16 and int8 (10^9 products/s).
// Compiled with -march=native by benchmarks/floors.py.
#include <immintrin.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr size_t buffer_bytes = size_t{256} << 20;  // far beyond any cache
constexpr long repeats = 10'000'000;
constexpr int chains = 20;  // independent sums, enough to keep two multipliers busy

double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The sum over threads of what `work` says it did, per second.
template <typename Work>
double rate(int threads, Work work) {
  std::vector<std::thread> team;
  std::vector<double> rates(static_cast<size_t>(threads));
  for (int rank = 0; rank < threads; ++rank) {
    team.emplace_back([&, rank] {
      const double start = now_s();
      const double done = work(rank);
      rates[static_cast<size_t>(rank)] = done / (now_s() - start);
    });
  }
  double sum = 0;
  for (size_t rank = 0; rank < team.size(); ++rank) {
    team[rank].join();
    sum += rates[rank];
  }
  return sum;
}

double read_buffer(const char* buffer) {
  __m256i sums[4] = {};
  for (size_t at = 0; at < buffer_bytes; at += 128) {
    _mm_prefetch(buffer + at + 4096, _MM_HINT_T0);
    _mm_prefetch(buffer + at + 4160, _MM_HINT_T0);
    for (size_t i = 0; i < 4; ++i) {
      const auto* part = reinterpret_cast<const __m256i*>(buffer + at + 32 * i);
      sums[i] = _mm256_add_epi64(sums[i], _mm256_load_si256(part));
    }
  }
  volatile long long kept = _mm256_extract_epi64(sums[0], 0) + _mm256_extract_epi64(sums[1], 0) +
                            _mm256_extract_epi64(sums[2], 0) + _mm256_extract_epi64(sums[3], 0);
  (void)kept;
  return static_cast<double>(buffer_bytes);
}

#define MULTIPLY(NAME, INSTRUCTION, PRODUCTS)                                                    \
  double NAME(int) {                                                                             \
    for (long i = 0; i < repeats; ++i) {                                                         \
      asm volatile(".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19\n" INSTRUCTION      \
                   " %%zmm30,%%zmm31,%%zmm\\n\n.endr\n" ::                                       \
                       : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", \
                         "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16",  \
                         "xmm17", "xmm18", "xmm19");                                             \
    }                                                                                            \
    return double{repeats} * chains * PRODUCTS;                                                  \
  }

#if defined(__AVX512F__)
MULTIPLY(multiply_float, "vfmadd231ps", 16)
#endif
#if defined(__AVX512BF16__)
MULTIPLY(multiply_bf16, "vdpbf16ps", 32)
#endif
#if defined(__AVX512VNNI__)
MULTIPLY(multiply_int8, "vpdpbusd", 64)
#endif

}  // namespace

int main(int, char** arguments) {
  const int threads = std::atoi(arguments[1]);
  std::vector<char*> buffers;
  for (int rank = 0; rank < threads; ++rank) {
    buffers.push_back(static_cast<char*>(std::aligned_alloc(4096, buffer_bytes + 8192)));
    std::memset(buffers.back(), 1, buffer_bytes + 8192);
  }
  double best = 0;
  for (int turn = 0; turn < 5; ++turn) {
    const double read =
        rate(threads, [&](int rank) { return read_buffer(buffers[static_cast<size_t>(rank)]); });
    best = read > best ? read : best;
  }
  std::printf("read %.1f\n", best / 1e9);
#if defined(__AVX512F__)
  std::printf("float %.1f\n", rate(threads, multiply_float) / 1e9);
#endif
#if defined(__AVX512BF16__)
  std::printf("bf16 %.1f\n", rate(threads, multiply_bf16) / 1e9);
#endif
#if defined(__AVX512VNNI__)
  std::printf("int8 %.1f\n", rate(threads, multiply_int8) / 1e9);
#endif
}
