// Torch wrappers of the router, CUDA.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "common/cuda_launch.h"
#include "common/cuda_tensors.h"
#include "routing/cuda/router.h"
#include "routing/routing_torch.h"

namespace pruneops {
namespace {

std::tuple<Tensor, Tensor> router_weights_cuda(const Tensor& x, const Tensor& weight,
                                               const std::optional<Tensor>& bias,
                                               const std::optional<Tensor>& target,
                                               std::string activation, double scale, double shift) {
  check_cuda(x, "x");
  check_router_input(x);
  const int64_t total = x.size(0), columns = x.size(1);
  const int32_t device = x.get_device_index();
  const DeviceGuard guard(device);
  const Tensor rows = checked_matrix(x, x.scalar_type(), total, columns, "x");
  const Tensor direction = cuda_vector(weight, x.scalar_type(), columns, device, "weight");
  const auto offset = cuda_vector(bias, x.scalar_type(), 1, device, "bias");
  const auto mask = cuda_vector(target, ScalarType::Bool, total, device, "target");
  const Tensor logits = empty_cuda_float32({total}, device);
  const Tensor weights = empty_cuda_float32({total}, device);

  CudaRouterParams params = router_params<CudaRouterParams>(rows, direction, mask, activation,
                                                            scale, shift, logits, weights);
  params.bias = offset.has_value() ? offset->const_data_ptr() : nullptr;
  STD_CUDA_CHECK(launch_router_weights(params, current_cuda_stream(device)));
  return {logits, weights};
}

std::tuple<Tensor, Tensor, Tensor> router_weights_backward_cuda(
    const Tensor& dweights, const Tensor& logits, const Tensor& x, const Tensor& weight,
    const std::optional<Tensor>& target, std::string activation, double scale) {
  check_cuda(x, "x");
  check_router_input(x);
  const int64_t total = x.size(0), columns = x.size(1);
  const int32_t device = x.get_device_index();
  const DeviceGuard guard(device);
  const Tensor upstream = cuda_vector(dweights, ScalarType::Float, total, device, "dweights");
  const Tensor values = cuda_vector(logits, ScalarType::Float, total, device, "logits");
  const Tensor rows = checked_matrix(x, x.scalar_type(), total, columns, "x");
  const Tensor direction = cuda_vector(weight, x.scalar_type(), columns, device, "weight");
  const auto mask = cuda_vector(target, ScalarType::Bool, total, device, "target");
  const Tensor dx = empty_cuda_like_dtype(x, {total, columns});
  const Tensor dweight = empty_cuda_like_dtype(x, {columns});
  const Tensor dbias = empty_cuda_like_dtype(x, {1});
  const Tensor partials = empty_cuda_float32({router_partials(total, columns)}, device);

  CudaRouterGradParams params = router_grad_params<CudaRouterGradParams>(
      upstream, values, rows, direction, mask, activation, scale, dx, dweight, dbias);
  params.partials = data_of<float>(partials);
  STD_CUDA_CHECK(launch_router_weights_backward(params, current_cuda_stream(device)));
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pruneops, CUDA, m) {
  m.impl("router_weights", TORCH_BOX(&router_weights_cuda));
  m.impl("router_weights_backward", TORCH_BOX(&router_weights_backward_cuda));
}

}  // namespace pruneops
