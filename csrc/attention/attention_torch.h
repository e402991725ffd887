// What the CPU wrappers of the attention family share: segments, workspaces, rows that no kernel
// writes.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "attention/attention_checks.h"
#include "attention/cpu/plan.h"
#include "common/parallel_torch.h"
#include "common/tensor_checks.h"

namespace pruneops {

// A CPU tensor of fp32, bf16 or fp16 with `dim` dimensions whose rows are contiguous.
inline Tensor checked_rows(const Tensor& t, int64_t dim, const char* name) {
  check_cpu(t, name);
  check_dim(t, dim, name);
  check_floating(t, name);
  const bool unit = t.size(dim - 1) <= 1 || t.stride(dim - 1) == 1;
  return unit ? t : torch::stable::contiguous(t);
}

// softmax_lse or its gradient, returned contiguous.
inline Tensor checked_lse(const Tensor& t, int64_t num_heads_q, int64_t total_q, const char* name) {
  check_cpu(t, name);
  check_lse(t, num_heads_q, total_q, name);
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// Scratch of all threads, 64-aligned.
class Workspace {
 public:
  Workspace(const AttentionKernels& kernels, const Heads& heads, const ParallelFor& parallel)
      : tensor_(empty_float32(
            {(kernels.workspace_bytes(heads) * std::max(parallel.num_threads, 1) + 64) / 4})) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(tensor_.mutable_data_ptr());
    data_ = reinterpret_cast<char*>((address + 63) / 64 * 64);
  }
  char* data() const { return data_; }

 private:
  Tensor tensor_;
  char* data_;
};

// Calls f(first, count) for the rows in [0, total) that no segment covers: kernels leave them
// alone.
//   covered_begin, covered_end  begin of the first segment and end of the last one
template <class F>
void for_uncovered_rows(int64_t covered_begin, int64_t covered_end, int64_t total, const F& f) {
  if (covered_begin > 0) f(int64_t{0}, covered_begin);
  if (covered_end < total) f(covered_end, total - covered_end);
}

struct Covered {
  int64_t q_begin = 0, q_end = 0, k_begin = 0, k_end = 0;

  explicit Covered(const std::vector<Segment>& segments) {
    if (segments.empty()) return;
    q_begin = segments.front().q_begin;
    q_end = segments.back().q_begin + segments.back().q_len;
    k_begin = segments.front().k_begin;
    k_end = segments.back().k_begin + segments.back().k_len;
  }
};

// Zeroes the rows of a contiguous tensor outside [begin, end).
inline void zero_uncovered_rows(const Tensor& t, int64_t begin, int64_t end) {
  int64_t row_bytes = static_cast<int64_t>(t.element_size());
  for (int64_t d = 1; d < t.dim(); ++d) row_bytes *= t.size(d);
  char* data = static_cast<char*>(t.mutable_data_ptr());
  for_uncovered_rows(begin, end, t.size(0), [&](int64_t first, int64_t count) {
    if (row_bytes > 0) {
      std::memset(data + first * row_bytes, 0, static_cast<size_t>(count * row_bytes));
    }
  });
}

// Fills the entries of [num_heads, total] outside [begin, end) of each head.
inline void fill_uncovered_rows(float* of_rows, int64_t num_heads, int64_t total, int64_t begin,
                                int64_t end, float value) {
  for_uncovered_rows(begin, end, total, [&](int64_t first, int64_t count) {
    for (int64_t h = 0; h < num_heads; ++h) std::fill_n(of_rows + h * total + first, count, value);
  });
}

// The LSE of rows [num_heads, total] outside [begin, end) is that of a row without keys.
inline void reset_uncovered_lse(float* lse, int64_t num_heads, int64_t total, int64_t begin,
                                int64_t end) {
  fill_uncovered_rows(lse, num_heads, total, begin, end, -std::numeric_limits<float>::infinity());
}

// What ForwardParams and BackwardParams have in common. `segments` has to outlive them.
template <class Params>
void set_problem(Params& params, const Tensor& q, const Tensor& k, const Tensor& v,
                 const Tensor& out, const Heads& heads, const Visibility& visibility,
                 double softmax_scale, const std::vector<Segment>& segments) {
  params.q = row_view(q);
  params.k = row_view(k);
  params.v = row_view(v);
  params.out = row_view(out);
  params.lse_stride = q.size(0);
  params.heads = heads;
  params.visibility = visibility;
  params.softmax_scale = static_cast<float>(softmax_scale);
  params.segments = segments.data();
}

inline void set_blocks(ForwardParams& params, const std::vector<Block>& blocks) {
  params.blocks = blocks.data();
  params.num_blocks = static_cast<int64_t>(blocks.size());
}

inline void set_blocks(BackwardParams& params, const BackwardBlocks& blocks) {
  params.row_blocks = blocks.rows.data();
  params.num_row_blocks = static_cast<int64_t>(blocks.rows.size());
  params.key_blocks = blocks.keys.data();
  params.num_key_blocks = static_cast<int64_t>(blocks.keys.size());
}

inline void set_gradients(BackwardParams& params, const Tensor& dout, const Tensor& dq,
                          const Tensor& dk, const Tensor& dv, const Tensor& dq_accumulator,
                          const Tensor& delta) {
  params.dout = row_view(dout);
  params.dq = row_view(dq);
  params.dk = row_view(dk);
  params.dv = row_view(dv);
  params.dq_accumulator = float_data(dq_accumulator);
  params.delta = float_data(delta);
}

inline std::vector<Segment> checked_packed_segments(const Tensor& cu_seqlens_q,
                                                    const Tensor& cu_seqlens_k, int64_t total_q,
                                                    int64_t total_k) {
  const Tensor cu_q = checked_cu_seqlens(cu_seqlens_q, "cu_seqlens_q");
  const Tensor cu_k = checked_cu_seqlens(cu_seqlens_k, "cu_seqlens_k");
  check_size(cu_k, 0, cu_q.size(0), "cu_seqlens_k");
  return packed_segments(int_data(cu_q), int_data(cu_k), cu_q.size(0) - 1, total_q, total_k);
}

}  // namespace pruneops
