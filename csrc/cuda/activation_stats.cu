// Launchers of the statistics; sae_kernels/cuda/activation_stats.py sorts the candidates of the top examples.
#include <algorithm>

#include "cuda/activation_stats.cuh"
#include "cuda/launch.h"

namespace sae_kernels {
namespace {

// Calls f<T, I>().
template <class F> void with_entries(const Tensor& values, const Tensor& indices, F&& f) {
  with_float_type(values.scalar_type(), [&]<class T>(T) {
    switch (indices.scalar_type()) {
      case ScalarType::Int: return f.template operator()<T, int32_t>();
      case ScalarType::Long: return f.template operator()<T, int64_t>();
      default: STD_TORCH_CHECK(false, "sae_kernels: indices must be int32 or int64");
    }
  });
}

template <class T, class I> EntryArgs<T, I> entry_args(const Tensor& values, const Tensor& indices, int64_t d_sae) {
  EntryArgs<T, I> args{};
  args.values = data<T>(values);
  args.indices = data<I>(indices);
  args.entries = values.numel();
  args.d_sae = d_sae;
  args.k = static_cast<int>(values.size(1));
  return args;
}

dim3 stats_grid(int64_t threads) { return grid_of(ceil_div(threads, kStatsThreads)); }

}  // namespace

void stats_update(Tensor values, Tensor indices, Tensor counts, Tensor sums, Tensor maximum, Tensor last,
                  Tensor rejected, Tensor foreign, int64_t row, std::optional<Tensor> numbers) {
  with_entries(values, indices, [&]<class T, class I>() {
    StatsArgs<T, I> args{};
    args.values = data<T>(values);
    args.indices = data<I>(indices);
    args.numbers = data_or_null<int64_t>(numbers);
    args.counts = mutable_data<int64_t>(counts);
    args.last = mutable_data<int64_t>(last);
    args.rejected = mutable_data<int64_t>(rejected);
    args.sums = mutable_data<int64_t>(sums);
    args.maximum = mutable_data<double>(maximum);
    args.foreign = mutable_data<int64_t>(foreign);
    args.entries = values.numel();
    args.row = row;
    args.d_sae = counts.size(0);
    args.k = static_cast<int>(values.size(1));
    const Device device = device_of(values);
    const int64_t most = (device.shared_bytes - kQueueBytes) / StatsTable<T>::kBytes / kWarp * kWarp;
    const int64_t tables = ceil_div(args.d_sae, most);
    args.latents = static_cast<int>(ceil_div(ceil_div(args.d_sae, tables), kWarp) * kWarp);
    const int64_t bytes = int64_t(args.latents) * StatsTable<T>::kBytes + kQueueBytes;
    // as many blocks as run at once: every one of them adds its whole table to the state
    const int64_t at_once = device.processors * std::clamp<int64_t>(device.shared_bytes / bytes, 1, 2);
    args.share = ceil_div(args.entries, std::max<int64_t>(1, at_once / tables));
    args.share = std::min(std::max<int64_t>(args.share, 8 * kTallyThreads), kLargestShare);
    launch(add_entries<T, I>, grid_of(ceil_div(args.entries, args.share), tables), kTallyThreads, args, values, bytes);
    launch(carry_limbs<T, I>, stats_grid(2 * args.d_sae), kStatsThreads, args, values);
  });
}

void stats_histogram(Tensor values, Tensor indices, Tensor table, int64_t low, int64_t bits) {
  with_entries(values, indices, [&]<class T, class I>() {
    auto args = entry_args<T, I>(values, indices, table.size(0));
    args.table = mutable_data<int64_t>(table);
    args.columns = table.size(1);
    args.first = (1023 + low) * (int64_t{1} << bits) - 1;
    args.shift = static_cast<int>(52 - bits);
    launch(count_bins<T, I>, stats_grid(args.entries), kStatsThreads, args, values);
  });
}

void stats_cooccurrence(Tensor values, Tensor indices, std::optional<Tensor> position, Tensor table) {
  with_entries(values, indices, [&]<class T, class I>() {
    auto args = entry_args<T, I>(values, indices, position ? position->size(0) : table.size(0));
    args.position = data_or_null<int64_t>(position);
    args.table = mutable_data<int64_t>(table);
    args.columns = table.size(0);
    launch(count_pairs<T, I>, grid_of(values.size(0)), kStatsThreads, args, values);
  });
}

void stats_mark(Tensor values, Tensor indices, Tensor top_values, Tensor keys) {
  with_entries(values, indices, [&]<class T, class I>() {
    auto args = entry_args<T, I>(values, indices, top_values.size(0));
    args.top_values = mutable_data<double>(top_values);
    args.n = static_cast<int>(top_values.size(1));
    args.keys = mutable_data<int32_t>(keys);
    launch(mark_candidates<T, I>, stats_grid(args.entries), kStatsThreads, args, values);
  });
}

void stats_merge(Tensor values, Tensor indices, Tensor ids, Tensor order, Tensor starts, Tensor top_values,
                 Tensor top_ids) {
  with_entries(values, indices, [&]<class T, class I>() {
    auto args = entry_args<T, I>(values, indices, top_values.size(0));
    args.ids = data<int64_t>(ids);
    args.order = data<int64_t>(order);
    args.starts = data<int64_t>(starts);
    args.top_values = mutable_data<double>(top_values);
    args.top_ids = mutable_data<int64_t>(top_ids);
    args.n = static_cast<int>(top_values.size(1));
    launch(merge_candidates<T, I>, stats_grid(args.d_sae * kWarp), kStatsThreads, args, values);
  });
}

void stats_fired(Tensor values, Tensor indices, std::optional<Tensor> counted, Tensor marks) {
  with_entries(values, indices, [&]<class T, class I>() {
    FiredArgs<T, I> args{};
    args.values = data<T>(values);
    args.indices = data<I>(indices);
    args.counted = data_or_null<bool>(counted);
    args.marks = mutable_data<bool>(marks);
    args.entries = values.numel();
    args.packs = aligned(16, args.values) && aligned(16, args.indices) ? args.entries / kPack : 0;
    args.d_sae = marks.size(0);
    args.k = static_cast<int>(values.size(1));
    const Device device = device_of(values);
    const int64_t ranges = ceil_div(args.d_sae, 8 * (device.shared_bytes / 4 * 4));
    args.latents = static_cast<int>(ceil_div(ceil_div(args.d_sae, ranges), kWarp) * kWarp);
    // a block per multiprocessor, and no more than have a pack for each thread
    const int64_t shares = std::min(device.processors / ranges, ceil_div(args.entries, kPack * kTallyThreads));
    const dim3 grid = grid_of(std::max<int64_t>(shares, 1), ranges);
    launch(mark_fired<T, I>, grid, kTallyThreads, args, values, args.latents / 8);
  });
}

}  // namespace sae_kernels

STABLE_TORCH_LIBRARY_IMPL(sae_kernels, SK_DEVICE, m) {
  m.impl("cuda_stats_update", TORCH_BOX(&sae_kernels::stats_update));
  m.impl("cuda_stats_histogram", TORCH_BOX(&sae_kernels::stats_histogram));
  m.impl("cuda_stats_cooccurrence", TORCH_BOX(&sae_kernels::stats_cooccurrence));
  m.impl("cuda_stats_mark", TORCH_BOX(&sae_kernels::stats_mark));
  m.impl("cuda_stats_merge", TORCH_BOX(&sae_kernels::stats_merge));
  m.impl("cuda_stats_fired", TORCH_BOX(&sae_kernels::stats_fired));
}
