// Torch wrappers of the weighted rows, CUDA.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "common/cuda_launch.h"
#include "common/cuda_tensors.h"
#include "compaction/cuda/scaled.h"
#include "compaction/scaled_torch.h"

namespace pruneops {
namespace {

Tensor matrix_like(const Tensor& t, const Tensor& x, int64_t rows, const char* name) {
  check_cuda(t, x.get_device_index(), name);
  return checked_matrix(t, x.scalar_type(), rows, x.size(1), name);
}

Tensor scatter_scaled_cuda(const Tensor& x, const Tensor& residual, const Tensor& branch,
                           const Tensor& weights, const Tensor& indices) {
  check_cuda(x, "x");
  check_scaled_input(x);
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

  CudaScatterScaledParams params =
      scatter_scaled_params<CudaScatterScaledParams>(rows, base, added, w, out);
  params.indices = const_data_of<int32_t>(idx);
  params.kept = idx.size(0);
  STD_CUDA_CHECK(
      launch_scatter_scaled(params, cuda_device(device).num_sms, current_cuda_stream(device)));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> scatter_scaled_backward_cuda(const Tensor& dout,
                                                                        const Tensor& x,
                                                                        const Tensor& branch,
                                                                        const Tensor& weights,
                                                                        const Tensor& indices) {
  check_cuda(x, "x");
  check_scaled_input(x);
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

  const CudaScatterScaledGradParams params =
      scatter_scaled_grad_params<CudaScatterScaledGradParams>(upstream, rows, added, w, idx, dx,
                                                              dresidual, dbranch, dweights);
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
