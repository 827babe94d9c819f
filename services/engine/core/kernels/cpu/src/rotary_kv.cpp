// Rotary position embedding (Su et al., arXiv:2104.09864) and the write to the packed KV cache.
#include "rotary_kv.h"

#include <algorithm>

#include "activations.h"
#include "simd.h"

namespace meshserve::MESHSERVE_ISA {

namespace {

constexpr int32_t tokens_per_task = 8;
constexpr int32_t most_head_dim = 512;  // kv_cache.py refuses more
// Vectors smaller than this throughout are stored in int8 as zeros: their scale has no inverse.
constexpr float least_magnitude = 1e-30f;

void rotate(float* head, const float* cos, const float* sin, int32_t half) {
  for (int32_t dim = 0; dim < half; dim += lanes) {
    const int32_t count = std::min(half - dim, lanes);
    const Floats c = load_some(cos + dim, count), s = load_some(sin + dim, count);
    const Floats first = load_some(head + dim, count);
    const Floats second = load_some(head + half + dim, count);
    const Floats negative = subtract(broadcast(0.0f), second);
    store_some(head + dim, fused(negative, s, multiply(first, c)), count);
    store_some(head + half + dim, fused(first, s, multiply(second, c)), count);
  }
}

// Writes one token's vector to its place among the 16 of a tile of keys: pairs of dimensions are
// 16 pairs apart.
template <typename Element>
void write_key(const Element* elements, int32_t head_dim, int32_t token, Element* tile) {
  for (int32_t dim = 0; dim < head_dim; dim += 2)
    std::memcpy(tile + dim * tile_tokens + 2 * token, elements + dim, 2 * sizeof(Element));
}

// The same in a tile of values. The other token of the pair may be another thread's to write, so
// that its elements must not be touched.
template <typename Element>
void write_value(const Element* elements, int32_t head_dim, int32_t token, Element* tile) {
  Element* to = tile + (token / 2 * head_dim) * 2 + token % 2;
  int32_t dim = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(Element) == 2) {
    const __mmask32 every_other = token % 2 ? 0xaaaaaaaau : 0x55555555u;
    for (; dim < head_dim; dim += lanes) {
      const auto* from = reinterpret_cast<const __m256i*>(elements + dim);
      const __m512i spread = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from));
      const __m512i placed = token % 2 ? _mm512_slli_epi32(spread, 16) : spread;
      _mm512_mask_storeu_epi16(to - token % 2 + 2 * dim, every_other, placed);
    }
  }
#endif
  for (; dim < head_dim; ++dim) to[2 * dim] = elements[dim];
}

// Rounds a vector to integers of -127 to 127 times the scale that it returns, which is NaN if an
// element is not finite.
float quantize(const float* from, int32_t head_dim, int8_t* to) {
  Floats largest = broadcast(0.0f), poison = broadcast(0.0f);
  for (int32_t dim = 0; dim < head_dim; dim += lanes) {
    const Floats elements = load(from + dim);
    largest = larger(largest, magnitude(elements));
    poison = fused(elements, broadcast(0.0f), poison);
  }
  const float most = maximum(largest);
  const bool tiny = most < least_magnitude;
  const Floats inverse = broadcast(tiny ? 0.0f : 127.0f / most);
  for (int32_t dim = 0; dim < head_dim; dim += lanes)
    store_int8(to + dim, multiply(load(from + dim), inverse));
  return (tiny ? 0.0f : most / 127.0f) + sum(poison);
}

void write_token(const RotaryKvArgs& args, int32_t token) {
  const KvLayout& cache = args.cache;
  const int32_t head_dim = cache.head_dim;
  const int64_t slot = slot_of(*args.step, cache, token);
  const auto in_block = static_cast<int32_t>(slot % cache.block_size);
  const int32_t in_tile = in_block % tile_tokens;
  const float* keys = args.qkv + token * args.qkv_stride + int64_t{args.heads} * head_dim;
  for (int32_t kv_head = 0; kv_head < cache.kv_heads; ++kv_head) {
    const float* key = keys + int64_t{kv_head} * head_dim;
    const float* value = key + int64_t{cache.kv_heads} * head_dim;
    const size_t offset = kv_tile_offset(cache, slot / cache.block_size, kv_head, in_block);
    auto* key_tile = static_cast<unsigned char*>(cache.keys) + offset;
    auto* value_tile = static_cast<unsigned char*>(cache.values) + offset;
    if (cache.format == KvFormat::bf16) {
      alignas(64) uint16_t rounded[most_head_dim];
      for (int32_t dim = 0; dim < head_dim; dim += lanes)
        store_bf16(rounded + dim, load(key + dim));
      write_key(rounded, head_dim, in_tile, reinterpret_cast<uint16_t*>(key_tile));
      for (int32_t dim = 0; dim < head_dim; dim += lanes)
        store_bf16(rounded + dim, load(value + dim));
      write_value(rounded, head_dim, in_tile, reinterpret_cast<uint16_t*>(value_tile));
      continue;
    }
    alignas(64) int8_t rounded[most_head_dim];
    const int32_t elements = tile_tokens * head_dim;
    reinterpret_cast<float*>(key_tile + elements)[in_tile] = quantize(key, head_dim, rounded);
    write_key(rounded, head_dim, in_tile, reinterpret_cast<int8_t*>(key_tile));
    reinterpret_cast<float*>(value_tile + elements)[in_tile] = quantize(value, head_dim, rounded);
    write_value(rounded, head_dim, in_tile, reinterpret_cast<int8_t*>(value_tile));
  }
}

}  // namespace

int rotary_kv_tasks(const RotaryKvArgs& args) {
  return (args.step->num_tokens + tokens_per_task - 1) / tokens_per_task;
}

size_t rotary_kv_scratch_bytes(const RotaryKvArgs&) { return 0; }

void rotary_kv_run(const RotaryKvArgs& args, int task, void*) {
  const int32_t half = args.rotary_dim / 2;
  const int32_t end = std::min((task + 1) * tokens_per_task, args.step->num_tokens);
  for (int32_t token = task * tokens_per_task; token < end; ++token) {
    const int64_t angles = int64_t{args.step->positions[token]} * half;
    float* heads = args.qkv + token * args.qkv_stride;
    for (int32_t head = 0; head < args.heads + args.cache.kv_heads; ++head) {
      float* own = heads + int64_t{head} * args.cache.head_dim;
      const float* norm = head < args.heads ? args.query_norm : args.key_norm;
      if (norm != nullptr) rms_norm(own, norm, args.norm_eps, args.cache.head_dim, own);
      rotate(own, args.cos + angles, args.sin + angles, half);
    }
    write_token(args, token);
  }
}

}  // namespace meshserve::MESHSERVE_ISA
