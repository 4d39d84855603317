// Shared by the launchers, which stand in the baseline unit of each kernel file. Kernels themselves never include torch.
//
// Every file of csrc/cpu is compiled once per instruction set (see setup.py) with -DSK_ISA=<name>. Its kernels live in
// namespace sae_kernels::SK_ISA and use only their own types there: an inline function shared between units could otherwise
// be linked from the wider one and trap on an older CPU. What stands under #ifdef SK_BASELINE (launchers and registration)
// is compiled once. SK_DISPATCH(f, args...) calls sae_kernels::<chosen set>::f.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/isa.h"

namespace sae_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls f(T{}) with the C++ type of a floating dtype.
template <class F>
void with_float_type(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(bf16{});
    case ScalarType::Half: return f(fp16{});
    default: STD_TORCH_CHECK(false, "sae_kernels: dtype must be float32, float64, bfloat16 or float16");
  }
}

template <class T>
const T* data(const Tensor& t) { return static_cast<const T*>(t.data_ptr()); }
template <class T>
T* mutable_data(const Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); }

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// Asks for huge pages under a large tensor about to be written: faults of 4 KiB cost more than many a kernel. Returns t.
inline Tensor in_huge_pages(Tensor t) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(t.data_ptr()) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(t.data_ptr()) + t.numel() * t.element_size()) / kHuge * kHuge;
  if (t.is_cpu() && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: it may be refused
#endif
  return t;
}

inline Tensor empty_like_dtype(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return in_huge_pages(
      torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size())));
}
inline Tensor empty_as(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
}

// Which latents compete, from a mask bool [d_sae] or none; both lists ascend.
struct LatentLists {
  std::vector<int32_t> competitors, rest;
  const int32_t* chosen;  // null: all
  int64_t count;
  LatentLists(const std::optional<Tensor>& mask, int64_t d_sae) : chosen(nullptr), count(d_sae) {
    if (!mask) return;
    const Tensor flags = dense(*mask);
    for (int32_t f = 0; f < d_sae; ++f) (data<bool>(flags)[f] ? competitors : rest).push_back(f);
    chosen = competitors.data();
    count = static_cast<int64_t>(competitors.size());
  }
  LatentLists(const LatentLists&) = delete;
};

}  // namespace sae_kernels
