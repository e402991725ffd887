// Torch wrappers of the router, CPU.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "common/parallel_torch.h"
#include "common/tensor_checks.h"
#include "routing/routing.h"
#include "routing/routing_torch.h"

namespace pruneops {
namespace {

float scalar_value(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16:
      return to_float(*static_cast<const BFloat16*>(t.const_data_ptr()));
    case ScalarType::Half:
      return to_float(*static_cast<const Half*>(t.const_data_ptr()));
    default:
      return *static_cast<const float*>(t.const_data_ptr());
  }
}

std::tuple<Tensor, Tensor> router_weights_cpu(const Tensor& x, const Tensor& weight,
                                              const std::optional<Tensor>& bias,
                                              const std::optional<Tensor>& target,
                                              std::string activation, double scale, double shift) {
  check_cpu(x, "x");
  check_router_input(x);
  const int64_t total = x.size(0), columns = x.size(1);
  const Tensor rows = checked_matrix(x, x.scalar_type(), total, columns, "x");
  const Tensor direction = checked_vector(weight, x.scalar_type(), columns, "weight");
  const auto offset = checked_vector(bias, x.scalar_type(), 1, "bias");
  const auto mask = checked_vector(target, ScalarType::Bool, total, "target");
  const Tensor logits = empty_float32({total});
  const Tensor weights = empty_float32({total});

  RouterParams params =
      router_params<RouterParams>(rows, direction, mask, activation, scale, shift, logits, weights);
  params.bias = offset.has_value() ? scalar_value(*offset) : 0.0f;
  router_weights(params, torch_parallel());
  return {logits, weights};
}

std::tuple<Tensor, Tensor, Tensor> router_weights_backward_cpu(
    const Tensor& dweights, const Tensor& logits, const Tensor& x, const Tensor& weight,
    const std::optional<Tensor>& target, std::string activation, double scale) {
  check_cpu(x, "x");
  check_router_input(x);
  const int64_t total = x.size(0), columns = x.size(1);
  const Tensor upstream = checked_vector(dweights, ScalarType::Float, total, "dweights");
  const Tensor values = checked_vector(logits, ScalarType::Float, total, "logits");
  const Tensor rows = checked_matrix(x, x.scalar_type(), total, columns, "x");
  const Tensor direction = checked_vector(weight, x.scalar_type(), columns, "weight");
  const auto mask = checked_vector(target, ScalarType::Bool, total, "target");
  const Tensor dx = empty_cpu_like_dtype(x, {total, columns});
  const Tensor dweight = empty_cpu_like_dtype(x, {columns});
  const Tensor dbias = empty_cpu_like_dtype(x, {1});
  const Tensor scratch = empty_float32({total + router_blocks(total) * columns});

  RouterGradParams params = router_grad_params<RouterGradParams>(
      upstream, values, rows, direction, mask, activation, scale, dx, dweight, dbias);
  params.dlogits = data_of<float>(scratch);
  params.partials = params.dlogits + total;
  router_weights_backward(params, torch_parallel());
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pruneops, CPU, m) {
  m.impl("router_weights", TORCH_BOX(&router_weights_cpu));
  m.impl("router_weights_backward", TORCH_BOX(&router_weights_backward_cpu));
}

}  // namespace pruneops
