// Checks and allocation for the CUDA wrappers, on the stable ABI only. As on the CPU, the Python
// front-ends give the precise errors; values on the device are never read.

#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "common/cuda_launch.h"
#include "common/float_types.h"
#include "common/tensor_checks.h"

namespace pruneops {

inline void check_cuda(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cuda(), name, " must be a CUDA tensor");
}

// A CUDA tensor on the device with this index.
inline void check_cuda(const Tensor& t, int32_t device_index, const char* name) {
  check_cuda(t, name);
  STD_TORCH_CHECK(t.get_device_index() == device_index, name, " must be on cuda:", device_index,
                  ", got cuda:", t.get_device_index());
}

// A 1-D CUDA vector of `dtype` and, if size >= 0, of that length; returned contiguous.
inline Tensor cuda_vector(const Tensor& t, ScalarType dtype, int64_t size, int32_t device_index,
                          const char* name) {
  check_cuda(t, device_index, name);
  check_dim(t, 1, name);
  check_dtype(t, dtype, name);
  if (size >= 0) check_size(t, 0, size, name);
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline std::optional<Tensor> cuda_vector(const std::optional<Tensor>& t, ScalarType dtype,
                                         int64_t size, int32_t device_index, const char* name) {
  if (!t.has_value()) return std::nullopt;
  return cuda_vector(*t, dtype, size, device_index, name);
}

// cu_seqlens: int32 [B + 1], so at least one entry.
inline Tensor cuda_cu_seqlens(const Tensor& t, int32_t device_index, const char* name) {
  Tensor out = cuda_vector(t, ScalarType::Int, -1, device_index, name);
  STD_TORCH_CHECK(out.size(0) >= 1, name, " must have at least one entry");
  return out;
}

// Uninitialised contiguous tensor on one CUDA device, from torch's caching allocator.
//   dtype  as aoti_torch_dtype_*() gives it
inline Tensor empty_cuda(const std::vector<int64_t>& sizes, int32_t dtype, int32_t device_index) {
  return empty_contiguous(sizes, dtype, aoti_torch_device_type_cuda(), device_index);
}

inline Tensor empty_cuda_int32(const std::vector<int64_t>& sizes, int32_t device_index) {
  return empty_cuda(sizes, aoti_torch_dtype_int32(), device_index);
}

inline Tensor empty_cuda_float32(const std::vector<int64_t>& sizes, int32_t device_index) {
  return empty_cuda(sizes, aoti_torch_dtype_float32(), device_index);
}

// The same with the dtype and device of `like`, whatever dtype that is.
inline Tensor empty_cuda_like_dtype(const Tensor& like, const std::vector<int64_t>& sizes) {
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return empty_cuda(sizes, dtype, like.get_device_index());
}

}  // namespace pruneops
