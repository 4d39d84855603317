// Sorting the few best of a row: (rank, tag) packed in one integer, in descending order.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "cpu/vec.h"

namespace sae_kernels {
namespace SK_ISA {

// 64-bit words up to this many go by counting (n^2 / lanes comparisons, no branches), more by radix.
constexpr int64_t kCountUpTo = 64;

typedef int64_t Words __attribute__((vector_size(kVecBytes)));

// The place of every word is the number of words above it; they are distinct. What lies behind the n words is read, not used.
inline void sort_by_counting(const int64_t* words, int64_t n, int64_t* out) {
  constexpr int L = kVecBytes / 8;
  for (int64_t i = 0; i < n; i += 2 * L) {
    Words mine[2], above[2] = {};
    std::memcpy(mine, words + i, sizeof mine);
    for (int64_t j = 0; j < n; ++j) {
      const Words other = Words{} + words[j];
      above[0] -= other > mine[0];
      above[1] -= other > mine[1];
    }
    for (int64_t lane = 0; lane < std::min<int64_t>(2 * L, n - i); ++lane) out[above[lane / L][lane % L]] = words[i + lane];
  }
}

// Two passes over the 16 highest bits of the distance from the smallest word; what is equal there, rarely more than a few
// words, is sorted by the rest.
inline int64_t* sort_by_radix(int64_t* words, int64_t n, int64_t* spare) {
  const auto [low, high] = std::minmax_element(words, words + n);
  const uint64_t least = static_cast<uint64_t>(*low), span = static_cast<uint64_t>(*high) - least;
  const int shift = std::max(0, 48 - __builtin_clzll(span | 1));
  const auto top = [=](int64_t word) { return (static_cast<uint64_t>(word) - least) >> shift; };
  uint32_t places[2][256] = {};
  for (int64_t i = 0; i < n; ++i) {
    ++places[0][top(words[i]) & 255];
    ++places[1][top(words[i]) >> 8];
  }
  for (int digit = 0; digit < 2; ++digit) {
    uint32_t above = 0;
    for (int value = 255; value >= 0; --value) above += std::exchange(places[digit][value], above);
    for (int64_t i = 0; i < n; ++i) spare[places[digit][top(words[i]) >> 8 * digit & 255]++] = words[i];
    std::swap(words, spare);
  }
  for (int64_t i = 0; i < n;) {
    int64_t end = i + 1;
    while (end < n && top(words[end]) == top(words[i])) ++end;
    if (end > i + 1) std::sort(words + i, words + end, [](int64_t a, int64_t b) { return a > b; });
    i = end;
  }
  return words;
}

// Words of n keys, in descending order: in `words` or in `spare`, each with room for n rounded up to 2 vectors.
template <class Word> inline Word* sort_words(Word* words, int64_t n, Word* spare) {
  if constexpr (std::is_same_v<Word, int64_t>) {
    if (n > kCountUpTo) return sort_by_radix(words, n, spare);
    sort_by_counting(words, n, spare);
    return spare;
  } else {
    std::sort(words, words + n, [](Word a, Word b) { return a > b; });
    return words;
  }
}

}  // namespace SK_ISA
}  // namespace sae_kernels
