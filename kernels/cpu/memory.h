// Buffers for what the kernels stream and keep.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>

namespace ryzen {

constexpr size_t CACHE_LINE = 64;
constexpr size_t HUGE_PAGE = size_t{2} << 20;

inline size_t rounded_up(size_t size, size_t multiple) { return (size + multiple - 1) / multiple * multiple; }

// `size` in whole cache lines, in bytes.
inline int64_t whole_lines(int64_t size) { return int64_t(rounded_up(size_t(size), CACHE_LINE)); }

struct Free {
  void operator()(uint8_t* data) const { std::free(data); }
};

using Bytes = std::unique_ptr<uint8_t[], Free>;

// Uninitialised memory that begins at a cache line.
inline Bytes allocate(size_t size, size_t alignment = CACHE_LINE) {
  auto* data = static_cast<uint8_t*>(std::aligned_alloc(alignment, rounded_up(size, alignment)));
  if (data == nullptr) throw std::bad_alloc();
  return Bytes(data);
}

// Uninitialised memory for weights, cut out of chunks of whole huge pages: with pages of 4 KiB, streaming a matrix
// costs a walk of the page tables every 4 KiB, and matrices that each began at a huge page would waste half of one
// each. A chunk lives as long as something cut out of it.
inline std::shared_ptr<uint8_t[]> allocate_weights(size_t size) {
#ifdef __SANITIZE_ADDRESS__
  return std::shared_ptr<uint8_t[]>(allocate(size));  // a block of its own, whose end the sanitizer sees
#endif
  constexpr size_t CHUNK = 16 * HUGE_PAGE;
  static std::mutex guard;
  static std::weak_ptr<uint8_t[]> current;
  static size_t used = 0, held = 0;
  const std::lock_guard<std::mutex> lock(guard);
  size = rounded_up(size, CACHE_LINE);
  std::shared_ptr<uint8_t[]> chunk = current.lock();
  if (!chunk || size > held - used) {
    const size_t whole = rounded_up(std::max(size, CHUNK), HUGE_PAGE);
    chunk = std::shared_ptr<uint8_t[]>(allocate(whole, HUGE_PAGE));
#ifdef MADV_HUGEPAGE
    madvise(chunk.get(), whole, MADV_HUGEPAGE);
#endif
    current = chunk;
    used = 0;
    held = whole;
  }
  uint8_t* data = chunk.get() + used;
  used += size;
  return {chunk, data};
}

// Room that one thread reuses from run to run; it only grows. `Purpose` keeps users of the same thread apart.
template <typename Purpose>
uint8_t* scratch(size_t size) {
  thread_local Bytes buffer;
  thread_local size_t held = 0;
  if (size > held) {
    buffer.reset();
    held = 0;
    buffer = allocate(size);
    held = size;
  }
  return buffer.get();
}

}  // namespace ryzen
