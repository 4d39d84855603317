// The k best of a stream of (score, latent) pairs, exact: larger score first, NaN above all, equal scores by lower latent.
#pragma once

#include <algorithm>
#include <limits>

#include "cpu/vec.h"

namespace sae_kernels {
namespace SK_ISA {

enum Activation : int { kRelu = 0, kNone = 1, kAbs = 2 };

// A pair as one unsigned integer that sorts as the contract says. Low word: the latent, complemented, above the sign of the
// pre-activation, which "abs" needs back.
template <class A> struct Key;

template <> struct Key<float> {
  using Bits = uint32_t;
  uint64_t word;
  static constexpr int kScoreShift = 32;
};
template <> struct Key<double> {
  using Bits = uint64_t;
  unsigned __int128 word;
  static constexpr int kScoreShift = 32;
};
template <class A> inline bool operator>(Key<A> a, Key<A> b) { return a.word > b.word; }

template <class A> inline Key<A> make_key(A score, uint32_t low) {
  using Bits = typename Key<A>::Bits;
  constexpr Bits top = Bits(1) << (sizeof(Bits) * 8 - 1);
  score += A(0);  // -0 becomes +0
  Bits bits;
  std::memcpy(&bits, &score, sizeof bits);
  bits = score != score ? ~Bits(0) : (bits & top) ? ~bits : bits | top;
  return {static_cast<decltype(Key<A>::word)>(bits) << Key<A>::kScoreShift | low};
}
template <class A> inline Key<A> make_key(A score, int32_t latent, bool negative) {
  return make_key(score, (0x7fffffffu - static_cast<uint32_t>(latent)) << 1 | (negative ? 1u : 0u));
}
template <class A> inline int32_t latent_of(Key<A> key) {
  return static_cast<int32_t>(0x7fffffffu - (static_cast<uint32_t>(key.word) >> 1));
}
template <class A> inline A score_of(Key<A> key) {
  using Bits = typename Key<A>::Bits;
  constexpr Bits top = Bits(1) << (sizeof(Bits) * 8 - 1);
  Bits bits = static_cast<Bits>(key.word >> Key<A>::kScoreShift);
  if (bits == ~Bits(0)) return std::numeric_limits<A>::quiet_NaN();
  bits = (bits & top) ? bits ^ top : ~bits;
  A score;
  std::memcpy(&score, &bits, sizeof score);
  return score;
}
template <class A> inline A pre_activation_of(Key<A> key, int activation) {
  const A score = score_of(key);
  return activation == kAbs && (key.word & 1) ? -score : score;
}

// Nothing at or below the floor need ever be kept: relu and abs pad with zeros, none pads with -inf.
template <class A> inline A floor_of(int activation) {
  return activation == kNone ? -std::numeric_limits<A>::infinity() : A(0);
}

// Candidates of one row: up to `capacity` keys; when full it keeps the best k and its threshold rises to the k-th.
template <class A> struct Row {
  Key<A> threshold;     // only keys above it can still win
  A threshold_score;    // its score; +inf where that is NaN, so that comparisons stay ordered
  int32_t threshold_latent;
  int32_t count;

  void reset(int activation) {
    count = 0;
    threshold_score = floor_of<A>(activation);
    threshold_latent = -1;
    threshold = make_key(threshold_score, 0xffffffffu);
  }
  void add(Key<A> key, Key<A>* keys, int64_t k, int64_t capacity) {
    if (!(key > threshold)) return;
    keys[count++] = key;
    if (count == capacity) tighten(keys, k);
  }
  void tighten(Key<A>* keys, int64_t k) {
    if (count < k) return;
    std::nth_element(keys, keys + k - 1, keys + count, [](Key<A> a, Key<A> b) { return a > b; });
    count = static_cast<int32_t>(k);
    threshold = keys[k - 1];
    threshold_score = score_of(threshold);
    threshold_latent = latent_of(threshold);
    if (threshold_score != threshold_score) threshold_score = std::numeric_limits<A>::infinity();
  }
};

// Which latents compete: all of [0, d_sae), or an ascending list; `rest` are the others, ascending.
struct Competitors {
  const int32_t* list;  // nullptr: all
  int64_t count;
  const int32_t* rest;
  int32_t operator[](int64_t i) const { return list ? list[i] : static_cast<int32_t>(i); }
};

// Sorts the row's best and writes k values and indices. Free slots take the lowest latents not chosen: competitors first
// (all of them sit at the floor), then the rest with value 0.
template <class T>
inline void write_row(Row<Acc<T>>& row, Key<Acc<T>>* keys, int64_t k, const Competitors& competitors, int activation, T* values,
                      int32_t* indices) {
  using A = Acc<T>;
  row.tighten(keys, k);
  const int64_t found = row.count;
  std::sort(keys, keys + found, [](Key<A> a, Key<A> b) { return a > b; });
  for (int64_t j = 0; j < found; ++j) {
    values[j] = from_acc<T>(pre_activation_of(keys[j], activation));
    indices[j] = latent_of(keys[j]);
  }
  if (found == k) return;
  std::sort(keys, keys + found, [](Key<A> a, Key<A> b) { return latent_of(a) < latent_of(b); });
  int64_t out = found, next = 0;
  for (int64_t i = 0; i < competitors.count && out < k; ++i) {
    if (next < found && latent_of(keys[next]) == competitors[i]) {
      ++next;
      continue;
    }
    values[out] = from_acc<T>(floor_of<A>(activation));
    indices[out++] = competitors[i];
  }
  for (int64_t i = 0; out < k; ++i) {
    values[out] = from_acc<T>(A(0));
    indices[out++] = competitors.rest[i];
  }
}

}  // namespace SK_ISA
}  // namespace sae_kernels
