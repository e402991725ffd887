// What the torch wrappers of the attention family share: tensors to RowViews, arguments to POD
// params.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "attention/attention.h"
#include "attention/cpu/plan.h"
#include "common/parallel_torch.h"
#include "common/tensor_checks.h"

namespace pruneops {

inline FloatType float_type(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16:
      return FloatType::kBFloat16;
    case ScalarType::Half:
      return FloatType::kFloat16;
    default:
      return FloatType::kFloat32;
  }
}

inline Tensor empty_float32(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d] > 0 ? sizes[d] : 1;
  }
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), aoti_torch_dtype_float32(),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline float* float_data(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// A CPU tensor of fp32, bf16 or fp16 with `dim` dimensions whose rows are contiguous.
inline Tensor checked_rows(const Tensor& t, int64_t dim, const char* name) {
  check_cpu(t, name);
  check_dim(t, dim, name);
  check_floating(t, name);
  const bool unit = t.size(dim - 1) <= 1 || t.stride(dim - 1) == 1;
  return unit ? t : torch::stable::contiguous(t);
}

// View of [rows, heads, head_dim] or slots [batch, capacity, heads, head_dim].
inline RowView row_view(const Tensor& t) {
  const int64_t d = t.dim();
  return {const_cast<void*>(t.const_data_ptr()), d == 4 ? t.stride(0) : 0, t.stride(d - 3),
          t.stride(d - 2), float_type(t)};
}

// Sizes shared by queries and keys, checked.
inline Heads checked_heads(const Tensor& q, const Tensor& k, const char* k_name) {
  const int64_t dq = q.dim(), dk = k.dim();
  const Heads heads{q.size(dq - 2), k.size(dk - 2), q.size(dq - 1),
                    k.size(dk - 2) > 0 ? q.size(dq - 2) / k.size(dk - 2) : 0};
  STD_TORCH_CHECK(q.scalar_type() == k.scalar_type(), k_name, " must have the dtype of q");
  check_size(k, dk - 1, heads.head_dim, k_name);
  STD_TORCH_CHECK(heads.head_dim >= 1 && heads.head_dim <= kMaxHeadDim, "head_dim must be in [1, ",
                  kMaxHeadDim, "], got ", heads.head_dim);
  STD_TORCH_CHECK(heads.num_heads_k >= 1 && heads.num_heads_q >= 1 &&
                      heads.num_heads_q % heads.num_heads_k == 0,
                  "the number of query heads must be a multiple of the number of key heads, got ",
                  heads.num_heads_q, " and ", heads.num_heads_k);
  STD_TORCH_CHECK(q.size(0) <= kMaxRows && k.size(dk - 3) <= kMaxRows, "too many rows");
  return heads;
}

inline void check_same_sizes(const Tensor& t, const Tensor& like, const char* name) {
  check_dim(t, like.dim(), name);
  for (int64_t d = 0; d < like.dim(); ++d) check_size(t, d, like.size(d), name);
}

// softmax_lse or its gradient: float32 [num_heads_q, total_q], returned contiguous.
inline Tensor checked_lse(const Tensor& t, int64_t num_heads_q, int64_t total_q, const char* name) {
  check_cpu(t, name);
  check_dim(t, 2, name);
  check_dtype(t, ScalarType::Float, name);
  check_size(t, 0, num_heads_q, name);
  check_size(t, 1, total_q, name);
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

// The LSE of rows [num_heads, total] outside [begin, end) is that of a row without keys.
inline void reset_uncovered_lse(float* lse, int64_t num_heads, int64_t total, int64_t begin,
                                int64_t end) {
  for_uncovered_rows(begin, end, total, [&](int64_t first, int64_t count) {
    for (int64_t h = 0; h < num_heads; ++h) {
      std::fill_n(lse + h * total + first, count, -std::numeric_limits<float>::infinity());
    }
  });
}

inline const int32_t* int_data(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const int32_t*>(t->const_data_ptr()) : nullptr;
}

inline const int32_t* int_data(const Tensor& t) {
  return static_cast<const int32_t*>(t.const_data_ptr());
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
