// What the shuffled reader does with rows of memory-mapped shards: asks the disk for them, copies them to their places.
// Bound by memory, so this is compiled once, for the baseline instruction set.
#ifdef SK_BASELINE
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "common.h"

namespace sae_kernels {
namespace {

constexpr int64_t kLine = 64;  // bytes

// f(first byte, rows) for each span (first row, rows) of its shard [rows, row_bytes]
template <class F>
void for_spans(const std::vector<Tensor>& shards, const Tensor& spans, int64_t row_bytes, const F& f) {
  STD_TORCH_CHECK(spans.size(0) == static_cast<int64_t>(shards.size()), "shard_rows: each span needs its shard");
  const int64_t* span = data<int64_t>(spans);
  for (size_t i = 0; i < shards.size(); ++i, span += 2) {
    const bool inside = span[0] >= 0 && span[1] >= 0 && span[0] + span[1] <= shards[i].size(0);
    const bool same = shards[i].size(1) == row_bytes && shards[i].is_contiguous();
    STD_TORCH_CHECK(inside && same, "shard_rows: a span is outside of its shard, or of other rows");
    f(data<char>(shards[i]) + span[0] * row_bytes, span[1]);
  }
}

void copy(char* to, const char* from, int64_t bytes) { std::memcpy(to, from, static_cast<size_t>(bytes)); }

// Whole lines, past the caches: a line that is overwritten need not be fetched first.
void copy_lines(char* to, const char* from, int64_t bytes) {
#if defined(__SSE2__)
  for (int64_t i = 0; i < bytes; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
#else
  copy(to, from, bytes);
#endif
}

// out[order[i]] = row i of all spans
void scatter(std::vector<Tensor> shards, Tensor spans, Tensor order, Tensor out) {
  order = dense(order);
  const int64_t bytes = out.size(1), step = out.stride(0), rows = out.size(0);
  const int64_t *place = data<int64_t>(order), *end = place + order.numel();
  const auto inside = [rows](int64_t p) { return static_cast<uint64_t>(p) < static_cast<uint64_t>(rows); };
  STD_TORCH_CHECK(std::all_of(place, end, inside), "shard_rows: order is not one of out's rows");
  char* to = mutable_data<char>(out);
  const auto whole_lines = (bytes | step | static_cast<int64_t>(reinterpret_cast<uintptr_t>(to))) % kLine == 0;
  const auto copy_row = whole_lines ? copy_lines : copy;
  for_spans(shards, dense(spans), bytes, [&](const char* from, int64_t n) {
    STD_TORCH_CHECK(n <= end - place, "shard_rows: more rows than places");
    for (; n > 0; --n, from += bytes) copy_row(to + *place++ * step, from, bytes);
  });
#if defined(__SSE2__)
  _mm_sfence();  // those stores wait for no later one
#endif
}

// Begins to read the spans that are not in memory: those whose middle page is not, as neighbours share the outer ones.
// Where told is false, mincore(2) does not tell, and all are asked for.
void ask(std::vector<Tensor> shards, Tensor spans, bool told) {
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto page_of = [page](const char* p) { return reinterpret_cast<uintptr_t>(p) / page * page; };
  if (shards.empty()) return;
  const int64_t bytes = shards[0].size(1);
  for_spans(shards, dense(spans), bytes, [&](const char* from, int64_t n) {
    unsigned char there = 0;
    if (told && mincore(reinterpret_cast<void*>(page_of(from + n * bytes / 2)), 1, &there) == 0 && there & 1) return;
    const uintptr_t begin = page_of(from), end = reinterpret_cast<uintptr_t>(from + n * bytes);
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_WILLNEED);  // a hint: it may be refused
  });
}

}  // namespace
}  // namespace sae_kernels

STABLE_TORCH_LIBRARY_IMPL(sae_kernels, CPU, m) {
  m.impl("shard_rows_scatter", TORCH_BOX(&sae_kernels::scatter));
  m.impl("shard_rows_ask", TORCH_BOX(&sae_kernels::ask));
}
#endif
