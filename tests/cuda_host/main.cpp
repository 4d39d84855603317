// Runs every kernel of csrc/cuda on small data, to be compiled with a sanitizer. Says nothing where nothing is found;
// the results themselves are checked by the tests that go through torch.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <numeric>
#include <random>

namespace {  // of this file alone: AddressSanitizer then guards the arrays that stand for shared memory
#include "cuda/activation_stats.cuh"
#include "cuda/batch_keep.cuh"
#include "cuda/latent_sums.cuh"
#include "cuda/threshold_select.cuh"
#include "cuda/topk_fused.cuh"
#include "cuda/topk_guess.cuh"
#include "cuda/topk_panels.cuh"
#include "cuda/topk_select.cuh"
}  // namespace

using namespace sae_kernels;

template <class T> std::vector<T> numbers(size_t n, int low, int high) {
  static std::mt19937 generator(0);
  std::uniform_int_distribution<int> one(low, high);
  std::vector<T> all(n);
  for (T& x : all) x = static_cast<T>(one(generator));
  return all;
}

// Two chunks of latents, with scores from 0 to `top`: there are more ties than the buffers hold.
template <class P, int V> void select(int rows, int columns, int k, int top) {
  std::vector<float> slab = numbers<float>(rows * columns, 0, top), bias(2 * columns), values(rows * k);
  std::vector<uint8_t> mask = numbers<uint8_t>(2 * columns, 0, 9);
  std::vector<uint64_t> keys(rows * k);
  std::vector<int32_t> indices(rows * k), trims(1);
  SelectArgs args{};
  args.slab = slab.data(), args.bias = bias.data(), args.mask = mask.data(), args.keys = keys.data();
  args.values = values.data(), args.indices = indices.data(), args.trims = trims.data();
  args.rows = rows, args.stride = args.columns = columns, args.k = k;
  const dim3 grid(ceil_div(rows, P::kRows));
  cuda_host::run(select_rows<P, V, kAbs>, grid, P::kThreads, args);
  args.first = columns, args.filled = args.last = 1;
  cuda_host::run(select_rows<P, V, kRelu>, grid, P::kThreads, args);
}

// Two chunks of latents; the scores from 1 to `top` pass in part, and more often than the buffer holds, or seldom.
template <int V> void pass(int rows, int columns, int k, int top, float threshold) {
  using P = ThresholdPlan<2, 256>;
  std::vector<float> slab = numbers<float>(rows * columns, 1, top), bias(2 * columns), values(rows * k);
  std::vector<float> thresholds(2 * columns, threshold);
  std::vector<uint8_t> mask = numbers<uint8_t>(2 * columns, 0, 9);
  std::vector<uint64_t> keys(rows * k);
  std::vector<int32_t> indices(rows * k), passed(rows);
  SelectArgs args{};
  args.slab = slab.data(), args.bias = bias.data(), args.keys = keys.data(), args.mask = mask.data();
  args.values = values.data(), args.indices = indices.data(), args.passed = passed.data();
  args.threshold = thresholds.data(), args.threshold_step = 1;
  args.rows = rows, args.stride = args.columns = columns, args.k = k;
  const dim3 grid(ceil_div(rows, P::kRows));
  cuda_host::run(select_passing<P, V, false>, grid, P::kThreads, args);
  args.first = columns, args.filled = args.last = 1;
  cuda_host::run(select_passing<P, V, true>, grid, P::kThreads, args);
}

// More tiles than stages, a last block that is not full; scores from few different ones: buffers fill up and are cut.
template <int KC, bool General> void encode_fused(int64_t rows, int d_in, int d_sae, int k, int sample) {
  std::vector<uint16_t> x = numbers<uint16_t>(rows * d_in, 0, 1), W = numbers<uint16_t>(d_sae * d_in, 0, 1);
  for (auto* some : {&x, &W})
    for (uint16_t& bits : *some) bits *= 0x3f80;  // 0 or 1
  std::vector<float> bias(d_sae), threshold(d_sae, 1.0f), values(rows * k);
  std::vector<int32_t> indices(rows * k), passed(rows);
  FusedArgs args{};
  args.tiles = 2 * int(ceil_div(d_sae, 2 * kTileLatents));
  std::vector<unsigned char> image(args.tiles * image_bytes(KC));
  const float* limits = General ? threshold.data() : nullptr;
  ArrangeArgs weights{W.data(), bias.data(), limits, image.data(), d_in, d_sae, 1, KC, 0.0f};
  cuda_host::run(arrange_weights<bf16>, dim3(args.tiles), kArrangeThreads, weights);
  args.x = x.data(), args.image = image.data(), args.values = values.data(), args.indices = indices.data();
  args.rows = rows, args.d_in = d_in, args.d_sae = d_sae, args.k = k, args.stages = KC + 3;
  args.sample = sample, args.stride = sample > 0 ? args.tiles / sample : 1;
  if (General) args.passed = passed.data();
  const auto encode = [&] {
    const dim3 grid(General ? ceil_div(rows, kGroupRows) : 1);
    const int64_t bytes = fused_bytes<3>(1, args.stages);
    cuda_host::run(topk_encode_rows<bf16, KC, 3, General>, grid, fused_threads(1), args, bytes);
  };
  encode();
  if (General) return;
  std::vector<int32_t> list(rows + 1);
  std::vector<float> norms(rows + 1);
  GuessArgs guess{values.data(), norms.data(), {list.data(), list.data() + rows}, norms.data() + rows, rows, 0, k};
  guess.n = int(rows);
  cuda_host::run(sample_rows, dim3(1), kGuessThreads, guess);
  args.only = guess.sample, args.norms = norms.data();
  encode();
  cuda_host::run(guess_from<float>, dim3(1), kWarp, guess);
  args.only = {}, args.norms = nullptr, args.guess = guess.guess, args.left = guess.sample;
  encode();
}

// One block for two items, tiles and panels that are not full, more chunks than stages.
void encode_panels(int64_t rows, int d_in, int d_sae, int k, int strip_tiles) {
  std::vector<uint16_t> x = numbers<uint16_t>(rows * d_in, 0, 1), W = numbers<uint16_t>(d_sae * d_in, 0, 1);
  for (auto* some : {&x, &W})
    for (uint16_t& bits : *some) bits *= 0x3f80;  // 0 or 1
  PanelArgs args{};
  args.rows = rows, args.d_sae = d_sae, args.k = k, args.depth = ceil_div(d_in, kTileDepth);
  args.tiles = ceil_div(d_sae, kWideLatents), args.strip_tiles = strip_tiles;
  args.strips = ceil_div(args.tiles, strip_tiles), args.items = args.strips * ceil_div(rows, kPanelRows);
  std::vector<unsigned char> lines(args.tiles * kWideLineBytes), pool(kPoolBytes);
  std::vector<uint64_t> keys(rows * args.strips * k);
  map_matrix(args.x, x.data(), rows, d_in, kPanelRows, true);
  map_matrix(args.W, W.data(), d_sae, d_in, kWideLatents, true);
  args.lines = lines.data(), args.pool = pool.data(), args.keys = keys.data();
  cuda_host::run(topk_encode_panels<bf16>, dim3(1), kPanelThreads, args, kPanelBytes);
  std::vector<float> values(rows * k);
  std::vector<int32_t> indices(rows * k);
  MergeArgs merge{keys.data(), values.data(), indices.data(), rows, args.strips * k, k, 64, Out::kFloat};
  cuda_host::run(merge_strips<0, 1>, dim3(1), kMergeRows * kWarp, merge, kMergeRows * 64 * 8);
  cuda_host::run(merge_strips<4, 2>, dim3(1), kMergeRows * kWarp, merge, kMergeRows * 64 * 8);
}

// Some rows have no candidate, some more than there are places.
void keep_of_batch(int64_t rows, int64_t m, int64_t total) {
  std::vector<float> values = numbers<float>(rows * m, -9, 9), kept(rows * m), threshold(1);
  std::vector<int32_t> counts = numbers<int32_t>(rows, 0, m + 2), above(rows), equal(rows), kept_counts(rows);
  std::vector<unsigned long long> digits(kDigits);
  std::vector<int64_t> state{0, total}, before(rows);
  KeepArgs args{};
  args.values = values.data(), args.counts = counts.data(), args.digits = digits.data(), args.state = state.data();
  args.above = above.data(), args.equal = equal.data(), args.before = before.data(), args.kept = kept.data();
  args.threshold = threshold.data(), args.kept_counts = kept_counts.data(), args.rows = rows, args.m = m;
  for (args.shift = 2 * kDigitBits; args.shift >= 0; args.shift -= kDigitBits) {
    cuda_host::run(count_digits, dim3(2), kKeepThreads, args);
    cuda_host::run(choose_digit, dim3(1), kKeepThreads, args);
  }
  const dim3 grid(ceil_div(rows, kKeepRows));
  cuda_host::run(split_rows, grid, kKeepThreads, args);
  std::inclusive_scan(equal.begin(), equal.end(), before.begin());
  cuda_host::run(write_kept, grid, kKeepThreads, args);
}

void sort_whole_rows() {
  const int rows = 2, columns = 270, k = 3;
  std::vector<float> slab = numbers<float>(rows * columns, -9, 9), values(rows * k);
  std::vector<uint64_t> keys(rows * columns);
  std::vector<int32_t> indices(rows * k);
  SelectArgs args{};
  args.slab = slab.data(), args.keys = keys.data(), args.values = values.data(), args.indices = indices.data();
  args.rows = rows, args.stride = args.columns = columns, args.k = k;
  cuda_host::run(write_keys<kNone, false>, dim3(2, 1), kElementThreads, args);
  cuda_host::run(write_codes<kNone>, dim3(1), kElementThreads, args);
}

template <int V> void decode(int64_t rows, int k, int64_t d_sae, int64_t d) {
  std::vector<float> values = numbers<float>(rows * k, -9, 9), W = numbers<float>(d_sae * d, -9, 9);
  std::vector<float> grad(rows * d), out(rows * d), bias(d), dots(rows * k);
  std::vector<int32_t> indices = numbers<int32_t>(rows * k, -1, d_sae);  // the first and the last are out of range
  DecodeArgs<float, int32_t> args{};
  args.values = values.data(), args.indices = indices.data(), args.W = W.data(), args.bias = bias.data();
  args.grad = grad.data(), args.out = out.data(), args.rows = rows, args.d_sae = d_sae, args.d = d;
  args.k = k, args.lanes = lanes_for(d, V);
  const int64_t teams = kDecodeThreads / args.lanes, slices = ceil_div(d, int64_t(args.lanes) * V);
  cuda_host::run(decode_rows<float, int32_t, V>, dim3(ceil_div(rows, teams), slices), kDecodeThreads, args);
  args.out = dots.data();
  cuda_host::run(dot_rows<float, int32_t, V>, dim3(ceil_div(rows, teams), ceil_div(k, kDots)), kDecodeThreads, args);
}

template <int V> void sums(int64_t rows, int k, int64_t d_sae, int64_t d, int64_t chunk) {
  const int64_t entries = rows * k, chunks = ceil_div(entries, chunk);
  std::vector<int32_t> latents = numbers<int32_t>(entries, -1, d_sae);
  std::sort(latents.begin(), latents.end());
  std::vector<int64_t> order(entries);
  for (int64_t i = 0; i < entries; ++i) order[i] = (i * 7) % entries;
  std::vector<float> data(rows * d), weights(entries), W(d_sae * d), dots(entries), out(d_sae * d), totals(d_sae);
  std::vector<float> slots(2 * chunks * d), slot_totals(2 * chunks);
  SumArgs<float, int32_t> args{};
  args.rows = data.data(), args.weights = weights.data(), args.W = W.data(), args.latents = latents.data();
  args.order = order.data(), args.dots = dots.data(), args.sums = out.data(), args.totals = totals.data();
  args.slots = slots.data(), args.slot_totals = slot_totals.data();
  args.entries = entries, args.chunk = chunk, args.d_sae = d_sae, args.d = d, args.k = k, args.lanes = lanes_for(d, V);
  const dim3 grid(ceil_div(chunks, kDecodeThreads / args.lanes), ceil_div(d, int64_t(args.lanes) * V));
  cuda_host::run(sum_runs<float, int32_t, V>, grid, kDecodeThreads, args);
  cuda_host::run(join_runs<float, int32_t, V>, grid, kDecodeThreads, args);
}

// Latents from -1 to d_sae in tables of 8, shares that do not end with a row; then the other kernels of the statistics.
template <class T> void statistics(int64_t rows, int k, int64_t d_sae, int n) {
  const int64_t entries = rows * k;
  std::vector<T> values = numbers<T>(entries, -3, 3);
  std::vector<int64_t> indices = numbers<int64_t>(entries, -1, d_sae), counts(d_sae), last(d_sae), rejected(d_sae);
  std::vector<int64_t> sums(d_sae * 2 * kLimbs), foreign(1), order, starts(d_sae + 1), ids(rows), table(d_sae * d_sae);
  std::vector<double> maximum(d_sae), top_values(d_sae * n);
  std::vector<int64_t> top_ids(d_sae * n);
  std::vector<int32_t> keys(entries);
  StatsArgs<T, int64_t> args{};
  args.values = values.data(), args.indices = indices.data(), args.counts = counts.data(), args.last = last.data();
  args.rejected = rejected.data(), args.sums = sums.data(), args.maximum = maximum.data();
  args.foreign = foreign.data(), args.entries = entries, args.share = entries / 2 - 1, args.d_sae = d_sae, args.k = k;
  args.latents = 8;
  const dim3 grid(ceil_div(entries, args.share), ceil_div(d_sae, 8));
  cuda_host::run(add_entries<T, int64_t>, grid, 64, args, 8 * StatsTable<T>::kBytes + kQueueBytes);
  cuda_host::run(carry_limbs<T, int64_t>, dim3(1), kStatsThreads, args);
  for (int64_t f = 0; f < d_sae; ++f) {
    starts[f] = order.size();
    for (int64_t e = 0; e < entries; ++e)
      if (indices[e] == f) order.push_back(e);
  }
  starts[d_sae] = order.size();
  EntryArgs<T, int64_t> entry{};
  entry.values = values.data(), entry.indices = indices.data(), entry.ids = ids.data(), entry.order = order.data();
  entry.starts = starts.data(), entry.table = table.data(), entry.top_values = top_values.data();
  entry.top_ids = top_ids.data(), entry.keys = keys.data(), entry.entries = entries, entry.d_sae = d_sae, entry.k = k;
  entry.n = n, entry.columns = d_sae, entry.shift = 52;
  cuda_host::run(count_bins<T, int64_t>, dim3(1), kStatsThreads, entry);
  cuda_host::run(count_pairs<T, int64_t>, dim3(2), kStatsThreads, entry);
  cuda_host::run(mark_candidates<T, int64_t>, dim3(1), kStatsThreads, entry);
  cuda_host::run(merge_candidates<T, int64_t>, dim3(ceil_div(d_sae * kWarp, kStatsThreads)), kStatsThreads, entry);
}

// Two ranges of latents, two shares that end within a pack; the indices go from -1 to d_sae.
template <class T, class I> void firings(int64_t rows, int k, int64_t d_sae) {
  const int64_t entries = rows * k;
  std::vector<T> values = numbers<T>(entries, 0, 1);
  std::vector<I> indices = numbers<I>(entries, -1, d_sae);
  std::vector<uint8_t> counted = numbers<uint8_t>(rows, 0, 1), marks(d_sae);
  FiredArgs<T, I> args{};
  args.values = values.data(), args.indices = indices.data(), args.entries = entries, args.d_sae = d_sae, args.k = k;
  args.counted = reinterpret_cast<const bool*>(counted.data()), args.marks = reinterpret_cast<bool*>(marks.data());
  args.packs = entries / kPack, args.latents = 32;
  cuda_host::run(mark_fired<T, I>, dim3(2, ceil_div(d_sae, 32)), 64, args, 32 / 8);
}

int main() {
  // as SelectTo1024, SelectTo32 and SelectTo64, with fewer threads
  select<SelectPlan<64, 1, 4, 512>, 4>(1, 1100, 40, 0);
  select<SelectPlan<32, 2, 4, 256>, 4>(3, 400, 5, 0);
  select<SelectPlan<32, 2, 8, 256>, 1>(2, 611, 40, 1);
  encode_fused<1, false>(3, 16, 512, 20, 2);
  encode_fused<2, true>(2, 72, 800, 40, 0);
  pass<4>(3, 400, 40, 2, 0.0f);
  pass<1>(3, 401, 60, 50, 48.0f);
  sort_whole_rows();
  keep_of_batch(11, 40, 150);
  encode_panels(3, 72, 600, 20, 2);
  decode<4>(5, 3, 7, 36);
  decode<1>(3, 6, 7, 35);
  sums<4>(10, 3, 5, 36, 4);
  sums<1>(5, 3, 4, 3, 2);
  statistics<float>(30, 5, 19, 3);
  statistics<double>(20, 5, 9, 35);
  firings<float, int32_t>(301, 5, 50);
  firings<double, int64_t>(30, 7, 33);
}
