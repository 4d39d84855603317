// In the place of csrc/cuda/pipeline.cuh: copies that are done at once, barriers of one atomic word. Acquire and release
// order are all that makes a copy visible, so ThreadSanitizer sees a missing wait or arrival.
#pragma once

#include <atomic>
#include <cstring>

#include "cuda/device.cuh"

namespace sae_kernels {

// From the highest bits on: arrivals of a phase, those still missing, the phase. An int, as Linux waits for one itself.
struct Barrier {
  uint64_t state;

  void init(int arrivals) { cell().store(arrivals << 24 | arrivals << 16); }
  void arrive() {
    int before = cell().load(), after;
    do {
      after = before - (1 << 16);
      if ((after >> 16 & 0xff) == 0) after = (before & 0xff << 24) | (before >> 24 & 0xff) << 16 | ((before + 1) & 0xffff);
    } while (!cell().compare_exchange_weak(before, after, std::memory_order_acq_rel));
    if ((before ^ after) & 0xffff) cell().notify_all();
  }
  // Until the phase of this parity has ended; the first phase has parity 0.
  void wait(int parity) {
    for (int now = cell().load(std::memory_order_acquire); (now & 1) == parity;
         now = cell().load(std::memory_order_acquire))
      cell().wait(now, std::memory_order_acquire);
  }

 private:
  std::atomic_ref<int> cell() { return std::atomic_ref<int>(*reinterpret_cast<int*>(&state)); }
};

struct Signal {
  int at;

  int read() { return std::atomic_ref<int>(at).load(std::memory_order_relaxed); }
  void raise(int to) {
    int now = read();
    while (now < to && !std::atomic_ref<int>(at).compare_exchange_weak(now, to, std::memory_order_relaxed)) {}
  }
};

constexpr int kFillers = 1;
inline void begin_fill(Barrier&, int) {}
inline void copy(void* to, const void* from, int bytes, Barrier&) {
  if (threadIdx.x % kWarp == 0) std::memcpy(to, from, bytes);
}
inline void end_fill(Barrier& full) {
  if (threadIdx.x % kWarp == 0) full.arrive();
}
inline void show_barriers() {}

}  // namespace sae_kernels
