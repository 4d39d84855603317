// The k best of a stream of (score, latent) pairs, exact: larger score first, NaN above all, equal scores by lower latent.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "cpu/sort_keys.h"

namespace sae_kernels {
namespace SK_ISA {

enum Activation : int { kRelu = 0, kNone = 1, kAbs = 2 };

// Ranks are signed integers in the order of the scores: NaN is the largest, -0 and +0 are one.
template <class A> struct RankOf;
template <> struct RankOf<float> { using type = int32_t; };
template <> struct RankOf<double> { using type = int64_t; };
template <class A> using Rank = typename RankOf<A>::type;

template <class A> constexpr Rank<A> kNanRank = std::numeric_limits<Rank<A>>::max();
template <class A> constexpr int kSignShift = sizeof(A) * 8 - 1;

template <class A> inline Vec<Rank<A>> rank_of(Vec<A> score) {
  const Vec<Rank<A>> bits = (Vec<Rank<A>>)(score + A(0)), ordered = bits ^ ((bits >> kSignShift<A>) & kNanRank<A>);
  return score == score ? ordered : Vec<Rank<A>>{} + kNanRank<A>;
}
template <class A> inline Rank<A> rank_of(A score) {
  if (score != score) return kNanRank<A>;
  Rank<A> bits;
  score += A(0);
  std::memcpy(&bits, &score, sizeof bits);
  return bits ^ ((bits >> kSignShift<A>) & kNanRank<A>);
}
template <class A> inline A score_of(Rank<A> rank) {
  if (rank == kNanRank<A>) return std::numeric_limits<A>::quiet_NaN();
  const Rank<A> bits = rank ^ ((rank >> kSignShift<A>) & kNanRank<A>);
  A score;
  std::memcpy(&score, &bits, sizeof score);
  return score;
}

// A latent and, in the lowest bit, whether its pre-activation is negative: "abs" needs the sign back.
inline uint32_t tag_of(int32_t latent, bool negative) { return static_cast<uint32_t>(latent) << 1 | negative; }
struct LowerTag { bool operator()(uint32_t a, uint32_t b) const { return a < b; } };
inline int32_t latent_of(uint32_t tag) { return static_cast<int32_t>(tag >> 1); }

// Nothing at or below the floor need ever be kept: relu and abs pad with zeros, none pads with -inf.
template <class A> inline A floor_of(int activation) {
  return activation == kNone ? -std::numeric_limits<A>::infinity() : A(0);
}

// bit i set: lane i of a comparison's result is true
template <class A> inline uint32_t mask_of(Vec<Rank<A>> lanes) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return _mm512_movepi32_mask((__m512i)lanes);
  else return _mm512_movepi64_mask((__m512i)lanes);
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) return _mm256_movemask_ps((__m256)lanes);
  else return _mm256_movemask_pd((__m256d)lanes);
#else
  uint32_t mask = 0;
  for (int i = 0; i < kLanes<A>; ++i) mask |= uint32_t(lanes[i] & 1) << i;
  return mask;
#endif
}

// Where a row's candidates lie: `capacity` ranks and as many tags, a multiple of the vector width and at least one vector
// more than are ever in use.
template <class A> struct Candidates {
  Rank<A>* ranks;
  uint32_t* tags;
  int64_t capacity;
  Candidates row(int64_t r) const { return {ranks + r * capacity, tags + r * capacity, capacity}; }
};
template <class A> inline int64_t capacity_of(int64_t k) {
  return (k + std::max<int64_t>(k, 32) + 4 * kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

template <class A> inline Vec<Rank<A>> load_ranks(const Rank<A>* p) {
  Vec<Rank<A>> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class A> inline int64_t count_at_least(const Rank<A>* ranks, int64_t padded, Rank<A> bound) {
  int64_t total = 0;
  for (int64_t i = 0; i < padded; i += kLanes<A>)
    total += __builtin_popcount(mask_of<A>(load_ranks<A>(ranks + i) >= bound));
  return total;
}

// A bound that `reach` >= k of the n ranks reach: at most k + slack, unless ties at the bound itself force more. Found bit by
// bit, as a distance from the smallest rank. What lies between n and the next multiple of the vector width is
// overwritten.
template <class A> struct Bound { Rank<A> rank; int64_t reach; };

template <class A> inline Bound<A> separate(Rank<A>* ranks, int64_t n, int64_t k, int64_t slack) {
  using U = std::make_unsigned_t<Rank<A>>;
  const int64_t padded = (n + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
  std::fill(ranks + n, ranks + padded, ranks[0]);
  Vec<Rank<A>> lows = load_ranks<A>(ranks), highs = lows;
  for (int64_t i = kLanes<A>; i < padded; i += kLanes<A>) {
    const Vec<Rank<A>> v = load_ranks<A>(ranks + i);
    lows = v < lows ? v : lows;
    highs = v > highs ? v : highs;
  }
  const Rank<A> low = horizontal_min<Rank<A>>(lows), high = horizontal_max<Rank<A>>(highs);
  if (low == high) return {low, n};
  std::fill(ranks + n, ranks + padded, std::numeric_limits<Rank<A>>::min());
  const U span = static_cast<U>(high) - static_cast<U>(low);
  Bound<A> bound{low, n};
  for (int bit = 63 - __builtin_clzll(static_cast<uint64_t>(span)); bit >= 0 && bound.reach > k + slack; --bit) {
    const U next = static_cast<U>(bound.rank) + (U(1) << bit);
    if (next - static_cast<U>(low) > span) continue;
    const int64_t reach = count_at_least<A>(ranks, padded, static_cast<Rank<A>>(next));
    if (reach >= k) bound = {static_cast<Rank<A>>(next), reach};
  }
  return bound;
}

// The state of one row: what its candidates must beat, and how many there are.
template <class A> struct Row {
  A threshold;  // score of threshold_rank; +inf where that is NaN, so that comparisons stay ordered
  Rank<A> threshold_rank;
  int32_t threshold_latent;  // at the threshold itself only lower latents than this one can win
  int32_t count;

  void reset(int activation) {
    count = 0;
    raise(rank_of(floor_of<A>(activation)), -1);
  }
  void raise(Rank<A> rank, int32_t latent) {
    threshold_rank = rank;
    threshold_latent = latent;
    threshold = score_of<A>(rank);
    if (threshold != threshold) threshold = std::numeric_limits<A>::infinity();
  }
  bool beaten_by(Rank<A> rank, int32_t latent) const {
    return rank > threshold_rank || (rank == threshold_rank && latent < threshold_latent);
  }
  void add(Rank<A> rank, uint32_t tag, const Candidates<A>& candidates, int64_t k) {
    candidates.ranks[count] = rank;
    candidates.tags[count++] = tag;
    make_room(candidates, k, 1);
  }
  void make_room(const Candidates<A>& candidates, int64_t k, int64_t places) {
    if (count + places + kLanes<A> > candidates.capacity) tighten(candidates, k, k / 4);
  }
  // Keeps the best k, and up to `slack` more where that is quicker; afterwards the threshold is as high as they allow.
  void tighten(const Candidates<A>& candidates, int64_t k, int64_t slack);

  // Appends the lanes in `mask` of a vector of ranks, without asking what they must beat; there is room for a vector.
  void append(Vec<Rank<A>> ranks, uint32_t mask, uint32_t negative, const int32_t* latents, const Candidates<A>& candidates) {
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == 4) {
      const __m512i tags = _mm512_slli_epi32(_mm512_loadu_si512(latents), 1);
      const __m512i marked = _mm512_mask_add_epi32(tags, negative, tags, _mm512_set1_epi32(1));
      _mm512_storeu_si512(candidates.ranks + count, _mm512_maskz_compress_epi32(mask, (__m512i)ranks));
      _mm512_storeu_si512(candidates.tags + count, _mm512_maskz_compress_epi32(mask, marked));
    } else {
      const __m256i tags = _mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(latents)), 1);
      const __m256i marked = _mm256_mask_add_epi32(tags, negative, tags, _mm256_set1_epi32(1));
      _mm512_storeu_si512(candidates.ranks + count, _mm512_maskz_compress_epi64(mask, (__m512i)ranks));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(candidates.tags + count), _mm256_maskz_compress_epi32(mask, marked));
    }
    count += __builtin_popcount(mask);
#else
    Rank<A> lanes[kLanes<A>];
    std::memcpy(lanes, &ranks, sizeof ranks);
    for (; mask; mask &= mask - 1) {
      const int i = __builtin_ctz(mask);
      candidates.ranks[count] = lanes[i];
      candidates.tags[count++] = tag_of(latents[i], negative >> i & 1);
    }
#endif
  }
};

template <class A> void Row<A>::tighten(const Candidates<A>& candidates, int64_t k, int64_t slack) {
  if (count < k) return;
  Rank<A>* ranks = candidates.ranks;
  uint32_t* tags = candidates.tags;
  const Bound<A> bound = separate<A>(ranks, count, k, slack);
  const bool tied = bound.reach > k + slack;
  int64_t kept = 0, ties = 0;
  int32_t last = std::numeric_limits<int32_t>::max();  // of the latents at the bound
  if (tied) {  // the equal ones move to the front, and the lowest latents of them stay
    for (int64_t i = 0; i < count; ++i)
      if (ranks[i] == bound.rank) {
        std::swap(ranks[i], ranks[ties]);
        std::swap(tags[i], tags[ties++]);
      }
    kept = k - (bound.reach - ties);
    std::nth_element(tags, tags + kept - 1, tags + ties, LowerTag{});
    last = latent_of(tags[kept - 1]);
  }
  int64_t i = ties;
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4)
    for (; i + kLanes<A> <= count; i += kLanes<A>) {
      const __m512i rank = _mm512_loadu_si512(ranks + i), tag = _mm512_loadu_si512(tags + i);
      const __mmask16 stays = _mm512_cmpge_epi32_mask(rank, _mm512_set1_epi32(bound.rank));
      _mm512_storeu_si512(ranks + kept, _mm512_maskz_compress_epi32(stays, rank));
      _mm512_storeu_si512(tags + kept, _mm512_maskz_compress_epi32(stays, tag));
      kept += __builtin_popcount(stays);
    }
#endif
  for (; i < count; ++i) {
    const Rank<A> rank = ranks[i];
    ranks[kept] = rank;
    tags[kept] = tags[i];
    kept += rank >= bound.rank;
  }
  count = static_cast<int32_t>(kept);
  if (bound.rank >= threshold_rank) raise(bound.rank, last);
}

// Which latents compete: all of [0, d_sae), or an ascending list; `rest` are the others, ascending.
struct Competitors {
  const int32_t* list;  // nullptr: all
  int64_t count;
  const int32_t* rest;
  int32_t operator[](int64_t i) const { return list ? list[i] : static_cast<int32_t>(i); }
};

// Rank and tag in one signed integer that sorts as the contract says.
template <class A> struct KeyWord;
template <> struct KeyWord<float> { using type = int64_t; };
template <> struct KeyWord<double> { __extension__ typedef __int128 type; };
template <class A> using Key = typename KeyWord<A>::type;

template <class A> inline Key<A> key_of(Rank<A> rank, uint32_t tag) { return Key<A>(rank) * (int64_t(1) << 32) + (0xffffffffu - tag); }
template <class A> inline uint32_t tag_in(Key<A> key) { return 0xffffffffu - static_cast<uint32_t>(key); }
// the score, with the sign it had before "abs"
template <class A> inline A pre_activation_in(Key<A> key) {
  const A score = score_of<A>(static_cast<Rank<A>>(key >> 32));
  return tag_in<A>(key) & 1 ? -score : score;
}
// Room for sorting k keys.
template <class A> inline int64_t key_room(int64_t k) { return 2 * (k + 2 * kLanes<double>); }

// Sorts the row's best and writes k values and indices; `keys` has key_room(k). Free slots take the lowest latents not
// chosen: competitors first, with the value `fill`, then the rest with value 0.
template <class A, class V>
inline void write_row(Row<A>& row, const Candidates<A>& candidates, Key<A>* keys, int64_t k, const Competitors& competitors, A fill,
                      V* values, int32_t* indices) {
  row.tighten(candidates, k, 0);
  const int64_t found = row.count;
  for (int64_t j = 0; j < found; ++j) keys[j] = key_of<A>(candidates.ranks[j], candidates.tags[j]);
  const Key<A>* sorted = sort_words(keys, found, keys + key_room<A>(k) / 2);
  for (int64_t j = 0; j < found; ++j) {
    values[j] = from_acc<V>(pre_activation_in<A>(sorted[j]));
    indices[j] = latent_of(tag_in<A>(sorted[j]));
  }
  if (found == k) return;
  std::sort(candidates.tags, candidates.tags + found, LowerTag{});
  int64_t out = found, next = 0;
  for (int64_t i = 0; i < competitors.count && out < k; ++i) {
    if (next < found && latent_of(candidates.tags[next]) == competitors[i]) {
      ++next;
      continue;
    }
    values[out] = from_acc<V>(fill);
    indices[out++] = competitors[i];
  }
  for (int64_t i = 0; out < k; ++i) {
    values[out] = from_acc<V>(A(0));
    indices[out++] = competitors.rest[i];
  }
}

}  // namespace SK_ISA
}  // namespace sae_kernels
