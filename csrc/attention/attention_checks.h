// What the torch wrappers of the attention family share on every device: tensors to RowViews,
// arguments to POD params.

#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "attention/attention.h"
#include "common/tensor_checks.h"

namespace pruneops {

inline float* float_data(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// View of [rows, heads, head_dim] or slots [batch, capacity, heads, head_dim]. The stride of a
// dimension without a second entry may be anything in torch; kernels get one as in a dense tensor.
inline RowView row_view(const Tensor& t) {
  const int64_t d = t.dim();
  const auto stride = [&](int64_t i) { return t.size(i) > 1 ? t.stride(i) : t.size(d - 1); };
  return {const_cast<void*>(t.const_data_ptr()), d == 4 ? stride(0) : 0, stride(d - 3),
          stride(d - 2), float_type(t)};
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
  STD_TORCH_CHECK(heads.num_heads_q <= kMaxHeads, "there may be at most ", kMaxHeads,
                  " query heads, got ", heads.num_heads_q);
  STD_TORCH_CHECK(q.size(0) <= kMaxRows && k.size(dk - 3) <= kMaxRows, "too many rows");
  return heads;
}

inline void check_same_sizes(const Tensor& t, const Tensor& like, const char* name) {
  check_dim(t, like.dim(), name);
  for (int64_t d = 0; d < like.dim(); ++d) check_size(t, d, like.size(d), name);
}

inline const int32_t* int_data(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const int32_t*>(t->const_data_ptr()) : nullptr;
}

inline const int32_t* int_data(const Tensor& t) {
  return static_cast<const int32_t*>(t.const_data_ptr());
}

// softmax_lse or its gradient: float32 [num_heads_q, total_q].
inline void check_lse(const Tensor& t, int64_t num_heads_q, int64_t total_q, const char* name) {
  check_dim(t, 2, name);
  check_dtype(t, ScalarType::Float, name);
  check_size(t, 0, num_heads_q, name);
  check_size(t, 1, total_q, name);
}

// Positions: int32 or int64 [rows].
inline void check_positions(const Tensor& t, const char* name) {
  check_dim(t, 1, name);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int || t.scalar_type() == ScalarType::Long, name,
                  " must be int32 or int64");
  STD_TORCH_CHECK(t.size(0) <= kMaxRows, name, " has too many rows");
}

inline Reduce checked_reduce(const std::string& value, const char* name) {
  if (value == "mean") return Reduce::kMean;
  if (value == "sum") return Reduce::kSum;
  STD_TORCH_CHECK(value == "max", name, " must be 'mean', 'sum' or 'max', got '", value, "'");
  return Reduce::kMax;
}

}  // namespace pruneops
