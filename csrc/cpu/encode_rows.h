// The rows of an encoder on the CPU: a GEMM in registers whose epilogue filters against each row's running threshold.
//
// Per block of at most 8 MiB of W_enc, packed once and read from the last-level cache by all rows; per tile of rows, packed
// into the second-level cache; per MR x NR register tile over the whole of d_in. A finished register tile is compared with
// its rows' thresholds (with its latents' own where those are given) and dropped unless something passes: pre-activations
// are never stored. Panels of latents are visited in a scattered order, so that scores sorted by latent raise the threshold
// as fast as random ones.
// Numbers are widened as they are packed, but bf16 stays in pairs where the CPU multiplies those (subnormal ones count as 0).
// Few rows take another way (encode_few): dot products straight from W_enc, latents split over the threads.
#pragma once

#include <numeric>

#include "cpu/encode_few.h"
#include "cpu/latent_sums.h"
#include "cpu/topk_tiles.h"

namespace sae_kernels {

namespace SK_ISA {

constexpr int64_t kBlockBytes = 8 << 20, kCandidateBytes = 16 << 20, kTileBytes = 512 << 10;
constexpr int64_t kFewRows = 96, kWorkOfOne = 8 << 20;

// Panels in an order that looks random to any structure along d_sae: steps of the golden ratio, made coprime to n.
struct Scatter {
  int64_t n, step;
  explicit Scatter(int64_t n) : n(n), step(std::max<int64_t>(1, static_cast<int64_t>(n * 0.6180339887498949))) {
    while (std::gcd(step, n) != 1) ++step;
  }
  int64_t operator()(int64_t i) const { return i * step % n; }
};

template <int Width, bool Pairs, class T> inline void pack_rows(const T* const* rows, int n, int64_t d_in, Acc<T>* out) {
  if constexpr (Pairs) pack_pairs<Width>(rows, n, d_in, out);
  else pack<Width>(rows, n, d_in, out);
}

// space: words(d_in) x NR of weights, NR biases, NR thresholds.
template <bool Pairs, class Args, class A>
void pack_panel(const Args& args, const Competitors& competitors, int64_t panel, Panel<A>& out, A* space, int32_t* latents) {
  constexpr int NR = kNR<A>;
  const typename Args::Input* rows[NR];
  A *bias = space + words<Pairs>(args.d_in) * NR, *thresholds = bias + NR;
  out = {space, bias, thresholds, latents, static_cast<int>(std::min<int64_t>(NR, competitors.count - panel * NR))};
  for (int i = 0; i < out.n; ++i) {
    latents[i] = competitors[panel * NR + i];
    rows[i] = args.W + latents[i] * args.d_in;
  }
  for (int i = 0; i < NR; ++i) bias[i] = args.bias && i < out.n ? to_acc(args.bias[latents[i]]) : A(0);
  if constexpr (Args::kFixed)
    for (int i = 0; i < NR; ++i) thresholds[i] = i < out.n ? static_cast<A>(args.thresholds[latents[i]]) : A(0);
  pack_rows<NR, Pairs>(rows, out.n, args.d_in, space);
}

// Room for the candidates of n rows.
template <class A> struct CandidateBuffer {
  Buffer<Rank<A>> ranks;
  Buffer<uint32_t> tags;
  int64_t capacity;
  CandidateBuffer(int64_t n, int64_t capacity) : ranks(n * capacity), tags(n * capacity), capacity(capacity) {}
  Candidates<A> row(int64_t r) const { return Candidates<A>{ranks.p, tags.p, capacity}.row(r); }
};

// Row r of the first split takes in its candidates of the others; a split's rows stand `rows` after those of the one before.
template <class A>
void merge_rows(Row<A>* state, const CandidateBuffer<A>& candidates, int64_t r, int64_t rows, int64_t splits, int64_t k) {
  for (int64_t other = rows + r; other < splits * rows; other += rows) {
    const Candidates<A> from = candidates.row(other);
    for (int64_t i = 0; i < state[other].count; ++i)
      if (state[r].beaten_by(from.ranks[i], latent_of(from.tags[i]))) state[r].add(from.ranks[i], from.tags[i], candidates.row(r), k);
  }
}

// Over all splits, whose rows stand `rows` apart.
inline int32_t total_passed(const int32_t* passed, int64_t r, int64_t rows, int64_t splits) {
  int32_t total = 0;
  for (int64_t s = 0; s < splits; ++s) total += passed[s * rows + r];
  return total;
}

// How many panels the seed takes: at least 4 k latents, few enough for the second-level cache; 0 where that is not to be had.
template <class A> int64_t seed_panels(int64_t k, int64_t panel_size, int64_t block) {
  const int64_t want = std::max<int64_t>(16, 4 * k / kNR<A>);
  const int64_t fits = kTileBytes / (panel_size * static_cast<int64_t>(sizeof(A)) + kMR * kNR<A> * static_cast<int64_t>(sizeof(A)));
  const int64_t panels = std::min({want, fits, block});
  return panels * kNR<A> >= 2 * k ? panels : 0;
}

// Writes row r of the arguments.
template <class Args, class A>
void finish_row(const Args& args, int64_t r, Row<A>& row, const Candidates<A>& candidates, Key<A>* keys, const Competitors& competitors) {
  const auto write = [&](const Competitors& fill, A value) {
    write_row(row, candidates, keys, args.k, fill, value, args.values + r * args.k, args.indices + r * args.k);
  };
  if constexpr (Args::kFixed) write({nullptr, args.d_sae, nullptr}, A(0));
  else write(competitors, floor_of<A>(args.activation));
}

template <bool Pairs, class Args> void encode_many(const Args& args) {
  using T = typename Args::Input;
  using A = Acc<T>;
  constexpr int NR = kNR<A>;
  const int64_t d_in = args.d_in, steps = words<Pairs>(d_in), k = args.k, workers = num_threads();
  const Competitors competitors{args.competitors, args.n_competitors, args.rest};
  const int64_t capacity = capacity_of<A>(k);

  const int64_t n_panels = (competitors.count + NR - 1) / NR;
  const int64_t panel_size = NR * steps, padded = (panel_size + 2 * NR + 15) / 16 * 16;
  const int64_t block = std::clamp<int64_t>(kBlockBytes / (padded * sizeof(A)), 1, n_panels);
  const int64_t chunk = std::min(args.rows, std::max<int64_t>(kMR * workers, kCandidateBytes / (capacity * (sizeof(A) + 4))));
  // rows too few to go round: the workers share the panels of each tile, each with candidates of its own
  const int64_t splits = chunk >= 8 * kMR * workers ? 1 : std::min(workers, block);
  const int64_t fits = kTileBytes / (std::max<int64_t>(steps, 1) * sizeof(A)), fair = (chunk * splits + workers - 1) / workers;
  const int64_t tile = (std::clamp<int64_t>(std::min(fits, fair), kMR, 20 * kMR) + kMR - 1) / kMR * kMR;

  const int64_t seed = Args::kFixed ? 0 : seed_panels<A>(k, panel_size, block / splits);
  const int64_t seed_ranks = (kMR + 1) * seed * NR + kMR * seed;  // and a word of signs per row and panel

  Buffer<A> packed(block * padded), tiles(workers * tile * steps);
  Buffer<Rank<A>> ranks(workers * seed_ranks);
  Buffer<Panel<A>> panels(block);
  Buffer<int32_t> latents(block * NR);
  const CandidateBuffer<A> candidates(chunk * splits, capacity);
  const int64_t room = key_room<A>(k);
  Buffer<Key<A>> keys(workers * room);
  Buffer<Row<A>> state(chunk * splits);
  Buffer<int32_t> passed(Args::kFixed ? chunk * splits : 0);
  const Scatter scatter(n_panels);

  for (int64_t c0 = 0; c0 < args.rows; c0 += chunk) {
    const int64_t n = std::min(chunk, args.rows - c0), n_tiles = (n + tile - 1) / tile;
    const auto write = [&](int64_t worker, int64_t r) {
      merge_rows(state.p, candidates, r, chunk, splits, k);
      if constexpr (Args::kFixed) args.counts[c0 + r] = total_passed(passed.p, r, chunk, splits);
      finish_row(args, c0 + r, state[r], candidates.row(r), keys + worker * room, competitors);
    };
    for (int64_t r = 0; r < chunk * splits; ++r) state[r].reset(Args::kFixed ? kNone : args.activation);
    if constexpr (Args::kFixed) std::fill(passed.p, passed + chunk * splits, 0);
    for (int64_t p0 = 0; p0 < n_panels; p0 += block) {
      const int64_t m = std::min(block, n_panels - p0);
      if (c0 == 0 || m < n_panels) {
        share_out(m, workers, [&](int64_t, int64_t p) {
          pack_panel<Pairs>(args, competitors, scatter(p0 + p), panels[p], packed + p * padded, latents + p * NR);
        });
      }
      share_out(n_tiles * splits, workers, [&](int64_t worker, int64_t task) {
        const int64_t split = task % splits, r0 = task / splits * tile, rows = std::min(tile, n - r0);
        const int64_t first = m * split / splits, count = m * (split + 1) / splits - first, place = split * chunk + r0;
        A* packed_x = tiles + worker * tile * steps;
        for (int64_t r = 0; r < rows; r += kMR) {
          const T* source[kMR];
          const int filled = static_cast<int>(std::min<int64_t>(kMR, rows - r));
          for (int i = 0; i < filled; ++i) source[i] = args.x + (c0 + r0 + r + i) * d_in;
          pack_rows<kMR, Pairs>(source, filled, d_in, packed_x + r * steps);
        }
        const bool abs = args.activation == kAbs;
        const int64_t done = p0 == 0 ? std::min(seed, count) : 0;
        if (!Args::kFixed && done > 0)
          (abs ? seed_tile<A, true, Pairs> : seed_tile<A, false, Pairs>)(
              packed_x, rows, panels + first, done, steps, state + place, candidates.row(place), k, ranks + worker * seed_ranks);
        (abs ? filter_tile<A, true, Pairs, Args::kFixed> : filter_tile<A, false, Pairs, Args::kFixed>)(
            packed_x, rows, panels + (first + done), count - done, steps, state + place, passed + place, candidates.row(place), k);
        if (splits == 1 && p0 + m == n_panels)
          for (int64_t r = r0; r < r0 + rows; ++r) write(worker, r);
      });
    }
    if (splits > 1) share_out(n, workers, write);
  }
}

template <class Args> void encode_few(const Args& args) {
  using A = Acc<typename Args::Input>;
  constexpr int L = kLanes<A>;
  const int64_t d_in = args.d_in, k = args.k, n_rows = args.rows, stride = (d_in + L - 1) / L * L;
  const Competitors competitors{args.competitors, args.n_competitors, args.rest};
  // a thread that sleeps can take milliseconds to come: it is called for 8 million multiply-adds, not for less
  const int64_t workers = std::clamp<int64_t>(n_rows * competitors.count * d_in / kWorkOfOne, 1, num_threads());

  // one state per worker and row; the first worker's then takes in the others'
  Buffer<A> x(n_rows * stride), bars(workers * n_rows * L);
  Buffer<Row<A>> state(workers * n_rows);
  Buffer<int32_t> passed(workers * n_rows);
  const CandidateBuffer<A> candidates(workers * n_rows, capacity_of<A>(k));
  Buffer<Key<A>> keys(key_room<A>(k));
  for (int64_t r = 0; r < n_rows; ++r)
    for (int64_t c = 0; c < stride; ++c) x[r * stride + c] = c < d_in ? to_acc(args.x[r * d_in + c]) : A(0);

  // scattered runs, each long enough for the hardware to stream
  constexpr int64_t kRun = 64;
  const int64_t runs = (competitors.count + kRun - 1) / kRun;
  const Scatter scatter(runs);
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) {
      const int64_t place = w * n_rows;
      const FewRows<A> mine{x.p, stride, state + place, bars + place * L, passed + place, candidates.row(place)};
      for (int64_t r = 0; r < n_rows; ++r) {
        mine.state[r].reset(Args::kFixed ? kNone : args.activation);
        mine.passed[r] = 0;
      }
      for (int64_t i = runs * w / workers; i < runs * (w + 1) / workers; ++i) {
        const int64_t first = scatter(i) * kRun;
        filter_run(args, mine, n_rows, competitors, first, std::min(first + kRun, competitors.count));
      }
    }
  });
  for (int64_t r = 0; r < n_rows; ++r) {
    merge_rows(state.p, candidates, r, n_rows, workers, k);
    if constexpr (Args::kFixed) args.counts[r] = total_passed(passed.p, r, n_rows, workers);
    finish_row(args, r, state[r], candidates.row(r), keys.p, competitors);
  }
}

template <class Args> void encode_rows(const Args& args) {
  if (args.rows == 0) return;
  if (args.n_competitors == 0) {
    for (int64_t i = 0; i < args.rows * args.k; ++i) {
      args.values[i] = {};
      args.indices[i] = static_cast<int32_t>(i % args.k);
    }
    if constexpr (Args::kFixed) std::fill(args.counts, args.counts + args.rows, 0);
    return;
  }
  if (args.rows <= kFewRows) return encode_few(args);
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<typename Args::Input, bf16>)
    if (cpu_isa() == kAvx512Bf16) return encode_many<true>(args);
#endif
  encode_many<false>(args);
}

}  // namespace SK_ISA
}  // namespace sae_kernels
