// Checks and allocation for the torch wrappers, on the stable ABI only. The Python front-ends give
// the precise errors; these checks keep direct callers of torch.ops.pruneops from crashing the
// process.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "common/float_types.h"
#include "common/huge_pages.h"
#include "common/rows.h"

namespace pruneops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Indices and boundaries are int32, so no packed dimension may be longer than this.
constexpr int64_t kMaxRows = std::numeric_limits<int32_t>::max();

inline void check_cpu(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be a CPU tensor");
}

inline void check_dim(const Tensor& t, int64_t dim, const char* name) {
  STD_TORCH_CHECK(t.dim() == dim, name, " must have ", dim, " dimensions, got ", t.dim());
}

inline void check_dtype(const Tensor& t, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " must be ", torch::headeronly::toString(dtype),
                  ", got ", torch::headeronly::toString(t.scalar_type()));
}

// fp32, bf16 or fp16
inline void check_floating(const Tensor& t, const char* name) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
      name, " must be float32, bfloat16 or float16, got ", torch::headeronly::toString(dtype));
}

// The kernels' name for the dtype of a tensor that passed check_floating.
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

inline void check_size(const Tensor& t, int64_t dim, int64_t size, const char* name) {
  STD_TORCH_CHECK(t.size(dim) == size, name, " must have size ", size, " in dimension ", dim,
                  ", got ", t.size(dim));
}

// A 1-D CPU vector of `dtype` and, if size >= 0, of that length; returned contiguous.
inline Tensor checked_vector(const Tensor& t, ScalarType dtype, int64_t size, const char* name) {
  check_cpu(t, name);
  check_dim(t, 1, name);
  check_dtype(t, dtype, name);
  if (size >= 0) check_size(t, 0, size, name);
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline std::optional<Tensor> checked_vector(const std::optional<Tensor>& t, ScalarType dtype,
                                            int64_t size, const char* name) {
  if (!t.has_value()) return std::nullopt;
  return checked_vector(*t, dtype, size, name);
}

// A matrix of `dtype` on any device with as many rows and columns; a copy if its rows are not
// dense.
inline Tensor checked_matrix(const Tensor& t, ScalarType dtype, int64_t rows, int64_t columns,
                             const char* name) {
  check_dim(t, 2, name);
  check_dtype(t, dtype, name);
  check_size(t, 0, rows, name);
  check_size(t, 1, columns, name);
  return columns <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

inline Rows rows_of(const Tensor& matrix) { return {matrix.const_data_ptr(), matrix.stride(0)}; }

// cu_seqlens: int32 [B + 1], so at least one entry.
inline Tensor checked_cu_seqlens(const Tensor& t, const char* name) {
  Tensor out = checked_vector(t, ScalarType::Int, -1, name);
  STD_TORCH_CHECK(out.size(0) >= 1, name, " must have at least one entry");
  return out;
}

template <class T>
T* data_of(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <class T>
const T* const_data_of(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

// Null if there is no tensor.
template <class T>
const T* const_data_of(const std::optional<Tensor>& t) {
  return t.has_value() ? const_data_of<T>(*t) : nullptr;
}

// Uninitialised contiguous tensor. One call into libtorch without the dispatcher.
//   sizes                extents of the new tensor
//   dtype, device_type   as aoti_torch_dtype_*() and aoti_torch_device_type_*() give them
inline Tensor empty_contiguous(const std::vector<int64_t>& sizes, int32_t dtype,
                               int32_t device_type, int32_t device_index) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d] > 0 ? sizes[d] : 1;
  }
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()),
                                                         sizes.data(), strides.data(), dtype,
                                                         device_type, device_index, &handle));
  return Tensor(handle);
}

// Uninitialised contiguous CPU tensor whose dtype is that of `like`, whatever dtype that is.
inline Tensor empty_cpu_like_dtype(const Tensor& like, const std::vector<int64_t>& sizes) {
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  Tensor out = empty_contiguous(sizes, dtype, aoti_torch_device_type_cpu(), 0);
  if (out.numel() > 0) {
    advise_huge_pages(out.mutable_data_ptr(),
                      out.numel() * static_cast<int64_t>(out.element_size()));
  }
  return out;
}

// Uninitialised contiguous float32 CPU tensor.
inline Tensor empty_float32(const std::vector<int64_t>& sizes) {
  return empty_contiguous(sizes, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0);
}

}  // namespace pruneops
