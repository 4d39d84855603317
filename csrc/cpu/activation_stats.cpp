// ActivationStats: per-latent counts, exact sums, maximum, last row; histogram, top examples, co-occurrence.
// Bound by one random access to a 64-byte line per entry, so this is compiled once, for the baseline instruction set.
// Everything added is an integer and everything else is a maximum under a total order: no split over threads shows.
#ifdef SK_BASELINE
#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <limits>
#include <thread>
#include <vector>

#include "common.h"

namespace sae_kernels {
namespace {

__extension__ typedef unsigned __int128 u128;
__extension__ typedef __int128 i128;

constexpr double kLimit = 4194304.0;        // 2^22, reference_stats.LIMIT
constexpr int64_t kFoldRows = 1 << 18;      // squares below 2^44 in units of 2^-64: so many fit 127 bits
constexpr int64_t kTableBytes = 256 << 20;  // cap on the private tables of all threads together
constexpr int64_t kLimbs = 8;               // of a latent: four of the sum, four of the sum of squares
constexpr size_t kLocks = 1024;

struct alignas(64) Tally {
  u128 sum = 0, squares = 0;
  int64_t count = 0, last = -1, rejected = 0;
  double maximum = -std::numeric_limits<double>::infinity();
};

struct Fixed { uint64_t mantissa; int shift; };  // mantissa * 2^shift in units of 2^-64

Fixed split(double size) {
  const uint64_t bits = std::bit_cast<uint64_t>(size), exponent = bits >> 52, low = bits & ((uint64_t{1} << 52) - 1);
  return {exponent ? low | uint64_t{1} << 52 : low, static_cast<int>(std::max<uint64_t>(exponent, 1)) - 1075 + 64};
}
Fixed split(float size) {
  const uint32_t bits = std::bit_cast<uint32_t>(size), exponent = bits >> 23, low = bits & ((1u << 23) - 1);
  return {exponent ? low | 1u << 23 : low, static_cast<int>(std::max(exponent, 1u)) - 150 + 64};
}
Fixed square(double size) { return split(size * size); }
Fixed square(float size) {
  const Fixed f = split(size);
  return {f.mantissa * f.mantissa, 2 * f.shift - 64};
}

// to the nearest integer, ties to even; a mantissa has 53 bits at most, so 2^-63 of it is 0
u128 rounded(Fixed f) {
  if (f.shift >= 0) return static_cast<u128>(f.mantissa) << f.shift;
  const int s = -f.shift;
  if (s > 62) return 0;
  const uint64_t whole = f.mantissa >> s, rest = f.mantissa & ((uint64_t{1} << s) - 1), half = uint64_t{1} << (s - 1);
  return whole + (rest > half || (rest == half && (whole & 1)));
}

template <class T>
bool fires(T value) { return value != 0 && std::abs(value) < static_cast<T>(kLimit); }

template <class T, class I>
void tally(const T* values, const I* indices, int64_t from, int64_t to, int64_t k, int64_t row, Tally* table) {
  for (int64_t r = from; r < to; ++r) {
    for (int64_t e = r * k; e < (r + 1) * k; ++e) {
      const T value = values[e];
      if (value == 0) continue;
      Tally& t = table[indices[e]];
      if (!fires(value)) {
        ++t.rejected;
        continue;
      }
      const T size = std::abs(value);
      const u128 add = rounded(split(size));
      t.sum += value < 0 ? -add : add;
      t.squares += rounded(square(size));
      ++t.count;
      t.maximum = std::max(t.maximum, static_cast<double>(value));
      t.last = row + r;
    }
  }
}

void add_limbs(int64_t* limbs, i128 x) {
  int64_t carry = 0;
  for (int i = 0; i < 3; ++i) {
    carry += limbs[i] + static_cast<int64_t>(static_cast<uint32_t>(x >> (32 * i)));
    limbs[i] = carry & 0xffffffff;
    carry >>= 32;
  }
  limbs[3] += carry + static_cast<int64_t>(x >> 96);
}

struct Nothing {};
struct State { int64_t *counts, *sums, *last, *rejected; double* maximum; };

// adds the tables to the state and clears them
void fold(Tally* tables, int64_t n_tables, int64_t d_sae, const State& state) {
  torch::stable::parallel_for(0, d_sae, 4096, [&](int64_t from, int64_t to) {
    for (int64_t table = 0; table < n_tables; ++table) {
      for (int64_t f = from; f < to; ++f) {
        Tally& t = tables[table * d_sae + f];
        state.rejected[f] += t.rejected;
        if (t.count) {
          state.counts[f] += t.count;
          add_limbs(state.sums + f * kLimbs, static_cast<i128>(t.sum));
          add_limbs(state.sums + f * kLimbs + kLimbs / 2, static_cast<i128>(t.squares));
          state.maximum[f] = std::max(state.maximum[f], t.maximum);
          state.last[f] = std::max(state.last[f], t.last);
        }
        t = Tally{};
      }
    }
  });
}

// f(values, indices) with the two dtypes that the public function lets through
template <class F>
void with_entries(const Tensor& values, const Tensor& indices, F&& f) {
  const auto with_values = [&]<class T>(T) {
    indices.scalar_type() == ScalarType::Int ? f(data<T>(values), data<int32_t>(indices))
                                             : f(data<T>(values), data<int64_t>(indices));
  };
  STD_TORCH_CHECK(values.scalar_type() == ScalarType::Float || values.scalar_type() == ScalarType::Double,
                  "activation_stats: values must be float32 or float64");
  values.scalar_type() == ScalarType::Float ? with_values(float{}) : with_values(double{});
}

// f(own, latent, value, row) for every firing, rows spread over the threads; each run of rows has an Own of its own
template <class Own, class F>
void for_firings(const Tensor& values, const Tensor& indices, F&& f) {
  const int64_t rows = values.size(0), k = values.size(1);
  with_entries(values, indices, [&](const auto* value, const auto* index) {
    torch::stable::parallel_for(0, rows, 1 + 16384 / (k + 1), [&](int64_t from, int64_t to) {
      Own own;
      for (int64_t r = from; r < to; ++r)
        for (int64_t e = r * k; e < (r + 1) * k; ++e)
          if (fires(value[e])) f(own, static_cast<int64_t>(index[e]), static_cast<double>(value[e]), r);
    });
  });
}

void count_up(int64_t* cell) { std::atomic_ref<int64_t>(*cell).fetch_add(1, std::memory_order_relaxed); }

void update(Tensor values, Tensor indices, Tensor counts, Tensor sums, Tensor maximum, Tensor last, Tensor rejected,
            int64_t row) {
  values = dense(values);
  indices = dense(indices);
  const int64_t rows = values.size(0), k = values.size(1), d_sae = counts.size(0);
  const State state{mutable_data<int64_t>(counts), mutable_data<int64_t>(sums), mutable_data<int64_t>(last),
                    mutable_data<int64_t>(rejected), mutable_data<double>(maximum)};
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t worth = std::min(rows * k / (2 * d_sae), kTableBytes / (d_sae * static_cast<int64_t>(sizeof(Tally))));
  const int64_t n_tables = std::clamp<int64_t>(worth, 1, threads);
  std::vector<Tally> tables(static_cast<size_t>(n_tables * d_sae));
  for (int64_t base = 0; base < rows; base += n_tables * kFoldRows) {
    const int64_t end = std::min(rows, base + n_tables * kFoldRows), step = (end - base + n_tables - 1) / n_tables;
    with_entries(values, indices, [&](const auto* value, const auto* index) {
      torch::stable::parallel_for(0, n_tables, 1, [&](int64_t from, int64_t to) {
        for (int64_t t = from; t < to; ++t)
          tally(value, index, std::min(end, base + t * step), std::min(end, base + (t + 1) * step), k, row,
                tables.data() + t * d_sae);
      });
    });
    fold(tables.data(), n_tables, d_sae, state);
  }
}

// a locked add lets no later miss start, so each cell is called for some firings ahead
struct Counter {
  static constexpr size_t kAhead = 32;
  int64_t* pending[kAhead] = {};
  size_t place = 0;

  void add(int64_t* cell) {
    __builtin_prefetch(cell, 1);
    std::swap(cell, pending[place++ % kAhead]);
    if (cell) count_up(cell);
  }
  ~Counter() {
    for (int64_t* cell : pending)
      if (cell) count_up(cell);
  }
};

void histogram(Tensor values, Tensor indices, Tensor table, int64_t low, int64_t bits) {
  const int64_t columns = table.size(1), first = (1023 + low) * (int64_t{1} << bits) - 1;
  int64_t* cells = mutable_data<int64_t>(table);
  for_firings<Counter>(dense(values), dense(indices), [&](Counter& counter, int64_t latent, double value, int64_t) {
    const int64_t number = (std::bit_cast<int64_t>(std::abs(value)) >> (52 - bits)) - first;
    counter.add(cells + latent * columns + std::clamp<int64_t>(number, 0, columns - 1));
  });
}

void top(Tensor values, Tensor indices, Tensor ids, Tensor top_values, Tensor top_ids) {
  ids = dense(ids);
  const int64_t n = top_values.size(1);
  const int64_t* id = data<int64_t>(ids);
  double* kept = mutable_data<double>(top_values);
  int64_t* kept_ids = mutable_data<int64_t>(top_ids);
  std::vector<std::atomic_flag> locks(kLocks);
  for_firings<Nothing>(dense(values), dense(indices), [&](Nothing, int64_t latent, double value, int64_t row) {
    double* v = kept + latent * n;
    int64_t* i = kept_ids + latent * n;
    const auto cell = [](double& x) { return std::atomic_ref<double>(x); };
    // read without the lock: the last kept value only ever rises
    if (value < cell(v[n - 1]).load(std::memory_order_relaxed)) return;
    std::atomic_flag& lock = locks[static_cast<size_t>(latent) % kLocks];
    while (lock.test_and_set(std::memory_order_acquire)) std::this_thread::yield();
    const auto before = [&](int64_t p) { return value > v[p] || (value == v[p] && id[row] < i[p]); };
    if (before(n - 1)) {
      int64_t p = n - 1;
      for (; p > 0 && before(p - 1); --p) {
        cell(v[p]).store(v[p - 1], std::memory_order_relaxed);
        i[p] = i[p - 1];
      }
      cell(v[p]).store(value, std::memory_order_relaxed);
      i[p] = id[row];
    }
    lock.clear(std::memory_order_release);
  });
}

void cooccurrence(Tensor values, Tensor indices, std::optional<Tensor> position, Tensor table) {
  values = dense(values);
  indices = dense(indices);
  const int64_t rows = values.size(0), k = values.size(1), m = table.size(0);
  const int64_t* place = position ? data<int64_t>(*position) : nullptr;
  int64_t* cells = mutable_data<int64_t>(table);
  with_entries(values, indices, [&](const auto* value, const auto* index) {
    torch::stable::parallel_for(0, rows, 1 + 4096 / (k * k + 1), [&](int64_t from, int64_t to) {
      std::vector<int64_t> members(static_cast<size_t>(k));
      for (int64_t r = from; r < to; ++r) {
        int64_t n = 0;
        for (int64_t e = r * k; e < (r + 1) * k; ++e) {
          const int64_t p = place ? place[index[e]] : static_cast<int64_t>(index[e]);
          if (p >= 0 && fires(value[e])) members[n++] = p;
        }
        for (int64_t a = 0; a < n; ++a)
          for (int64_t b = 0; b < n; ++b) count_up(cells + members[a] * m + members[b]);
      }
    });
  });
}

}  // namespace
}  // namespace sae_kernels

STABLE_TORCH_LIBRARY_IMPL(sae_kernels, CPU, m) {
  m.impl("activation_stats_update", TORCH_BOX(&sae_kernels::update));
  m.impl("activation_stats_histogram", TORCH_BOX(&sae_kernels::histogram));
  m.impl("activation_stats_top", TORCH_BOX(&sae_kernels::top));
  m.impl("activation_stats_cooccurrence", TORCH_BOX(&sae_kernels::cooccurrence));
}
#endif
