// Torch wrappers of the weighted rows, CUDA.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "common/cuda_launch.h"
#include "common/cuda_tensors.h"
#include "compaction/cuda/scaled.h"

namespace pruneops {
namespace {

// x: [total, columns], which everything else takes its dtype, sizes and device from.
void check_x(const Tensor& x) {
  check_cuda(x, "x");
  check_floating(x, "x");
  check_dim(x, 2, "x");
  STD_TORCH_CHECK(x.size(0) <= kMaxRows, "x has ", x.size(0), " rows; at most ", kMaxRows,
                  " are supported");
}

Tensor matrix_like(const Tensor& t, const Tensor& x, int64_t rows, const char* name) {
  check_cuda(t, x.get_device_index(), name);
  return checked_matrix(t, x.scalar_type(), rows, x.size(1), name);
}

Tensor scatter_scaled_cuda(const Tensor& x, const Tensor& residual, const Tensor& branch,
                           const Tensor& weights, const Tensor& indices) {
  check_x(x);
  const int64_t total = x.size(0);
  const int32_t device = x.get_device_index();
  const DeviceGuard guard(device);
  const Tensor idx = cuda_vector(indices, ScalarType::Int, -1, device, "indices");
  const Tensor w = cuda_vector(weights, ScalarType::Float, total, device, "weights");
  const Tensor rows = matrix_like(x, x, total, "x");
  const Tensor base = matrix_like(residual, x, idx.size(0), "residual");
  const Tensor added = matrix_like(branch, x, idx.size(0), "branch");
  const Tensor out = empty_cuda_like_dtype(x, {total, x.size(1)});
  if (out.numel() == 0) return out;

  CudaScatterScaledParams params{};
  params.x = rows_of(rows);
  params.residual = rows_of(base);
  params.branch = rows_of(added);
  params.weights = static_cast<const float*>(w.const_data_ptr());
  params.indices = static_cast<const int32_t*>(idx.const_data_ptr());
  params.out = out.mutable_data_ptr();
  params.type = float_type(x);
  params.total = total;
  params.kept = idx.size(0);
  params.columns = x.size(1);
  STD_CUDA_CHECK(
      launch_scatter_scaled(params, cuda_device(device).num_sms, current_cuda_stream(device)));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> scatter_scaled_backward_cuda(const Tensor& dout,
                                                                        const Tensor& x,
                                                                        const Tensor& branch,
                                                                        const Tensor& weights,
                                                                        const Tensor& indices) {
  check_x(x);
  const int64_t total = x.size(0), columns = x.size(1);
  const int32_t device = x.get_device_index();
  const DeviceGuard guard(device);
  const Tensor idx = cuda_vector(indices, ScalarType::Int, -1, device, "indices");
  const int64_t kept = idx.size(0);
  const Tensor w = cuda_vector(weights, ScalarType::Float, total, device, "weights");
  const Tensor upstream = matrix_like(dout, x, total, "dout");
  const Tensor rows = matrix_like(x, x, total, "x");
  const Tensor added = matrix_like(branch, x, kept, "branch");
  const Tensor dx = empty_cuda_like_dtype(x, {total, columns});
  const Tensor dresidual = empty_cuda_like_dtype(x, {kept, columns});
  const Tensor dbranch = empty_cuda_like_dtype(x, {kept, columns});
  const Tensor dweights = empty_cuda_float32({total}, device);

  CudaScatterScaledGradParams params{};
  params.dout = rows_of(upstream);
  params.x = rows_of(rows);
  params.branch = rows_of(added);
  params.weights = static_cast<const float*>(w.const_data_ptr());
  params.indices = static_cast<const int32_t*>(idx.const_data_ptr());
  params.dx = dx.mutable_data_ptr();
  params.dresidual = dresidual.mutable_data_ptr();
  params.dbranch = dbranch.mutable_data_ptr();
  params.dweights = static_cast<float*>(dweights.mutable_data_ptr());
  params.type = float_type(x);
  params.total = total;
  params.kept = kept;
  params.columns = columns;
  STD_CUDA_CHECK(launch_scatter_scaled_backward(params, cuda_device(device).num_sms,
                                                current_cuda_stream(device)));
  return {dx, dresidual, dbranch, dweights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pruneops, CUDA, m) {
  m.impl("scatter_scaled", TORCH_BOX(&scatter_scaled_cuda));
  m.impl("scatter_scaled_backward", TORCH_BOX(&scatter_scaled_backward_cuda));
}

}  // namespace pruneops
