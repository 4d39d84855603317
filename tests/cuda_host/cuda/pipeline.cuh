// In the place of csrc/cuda/pipeline.cuh: copies that are done at once, barriers of one atomic word. Acquire and release
// order are all that makes a copy visible, so ThreadSanitizer sees a missing wait or arrival.
#pragma once

#include <atomic>
#include <cstring>

#include "cuda/device.cuh"

namespace sae_kernels {

// From the highest bits on: arrivals of a phase, those still missing, the phase.
struct Barrier {
  uint64_t state;

  void init(int arrivals) { cell().store(uint64_t(arrivals) << 48 | uint64_t(arrivals) << 32); }
  void arrive() {
    uint64_t before = cell().load(), after;
    do {
      after = before - (uint64_t(1) << 32);
      if ((after >> 32 & 0xffff) == 0) after = (before >> 48) << 48 | (before >> 48) << 32 | (uint32_t(before) + 1);
    } while (!cell().compare_exchange_weak(before, after, std::memory_order_acq_rel));
    if (uint32_t(before) != uint32_t(after)) cell().notify_all();
  }
  void wait(int parity) {
    for (uint64_t now = cell().load(std::memory_order_acquire); int(now & 1) == parity;
         now = cell().load(std::memory_order_acquire))
      cell().wait(now, std::memory_order_acquire);
  }

 private:
  std::atomic_ref<uint64_t> cell() { return std::atomic_ref<uint64_t>(state); }
};

inline void copy_16(void* to, const void* from, bool inside) {
  if (inside) std::memcpy(to, from, 16);
  else std::memset(to, 0, 16);
}

inline void end_copies() {}
template <int N> void await_copies() {}

}  // namespace sae_kernels
