// Launcher of the choice among a batch's candidates.
#include "cuda/batch_keep.cuh"
#include "cuda/launch.h"

namespace sae_kernels {
namespace {

KeepArgs keep_args(const Tensor& values, const Tensor& counts, const Tensor& state, bool magnitude) {
  KeepArgs args{};
  args.values = data<float>(values);
  args.counts = data<int32_t>(counts);
  args.state = mutable_data<int64_t>(state);
  args.rows = values.size(0);
  args.m = values.size(1);
  args.magnitude = magnitude;
  return args;
}

dim3 grid_of_rows(const KeepArgs& args) { return grid_of(ceil_div(args.rows, kKeepRows)); }

}  // namespace

// state [2], the second being how many to keep, becomes what KeepArgs says; digits [kDigits] are zeros.
void batch_keep_split(Tensor values, Tensor counts, Tensor digits, Tensor state, Tensor above, Tensor equal,
                      bool magnitude) {
  KeepArgs args = keep_args(values, counts, state, magnitude);
  STD_TORCH_CHECK(digits.numel() == kDigits, "sae_kernels: digits must be [", kDigits, "]");
  args.digits = reinterpret_cast<unsigned long long*>(mutable_data<int64_t>(digits));
  args.above = mutable_data<int32_t>(above);
  args.equal = mutable_data<int32_t>(equal);
  const int64_t blocks = std::min<int64_t>(grid_of_rows(args).x, 8 * device_of(values).processors);
  for (args.shift = 2 * kDigitBits; args.shift >= 0; args.shift -= kDigitBits) {
    launch(count_digits, grid_of(blocks), kKeepThreads, args, values);
    launch(choose_digit, grid_of(1), kKeepThreads, args, values);
  }
  launch(split_rows, grid_of_rows(args), kKeepThreads, args, values);
}

void batch_keep_write(Tensor values, Tensor counts, Tensor state, Tensor above, Tensor equal, Tensor before,
                      Tensor kept, Tensor kept_counts, Tensor threshold, bool magnitude) {
  KeepArgs args = keep_args(values, counts, state, magnitude);
  args.above = mutable_data<int32_t>(above);
  args.equal = mutable_data<int32_t>(equal);
  args.before = data<int64_t>(before);
  args.kept = mutable_data<float>(kept);
  args.kept_counts = mutable_data<int32_t>(kept_counts);
  args.threshold = mutable_data<float>(threshold);
  launch(write_kept, grid_of_rows(args), kKeepThreads, args, values);
}

}  // namespace sae_kernels

STABLE_TORCH_LIBRARY_IMPL(sae_kernels, SK_DEVICE, m) {
  m.impl("cuda_batch_keep_split", TORCH_BOX(&sae_kernels::batch_keep_split));
  m.impl("cuda_batch_keep_write", TORCH_BOX(&sae_kernels::batch_keep_write));
}
