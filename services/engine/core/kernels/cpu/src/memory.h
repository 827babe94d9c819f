// Memory aligned for vectors and cache lines.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

namespace meshserve {

struct Freer {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<void, Freer>;

// At least `bytes`, 64-byte aligned. Throws std::bad_alloc.
inline Memory allocate(size_t bytes) {
  constexpr size_t alignment = 64;
  const size_t whole = (std::max<size_t>(bytes, 1) + alignment - 1) / alignment * alignment;
  void* memory = std::aligned_alloc(alignment, whole);
  if (memory == nullptr) throw std::bad_alloc();
  return Memory(memory);
}

}  // namespace meshserve
