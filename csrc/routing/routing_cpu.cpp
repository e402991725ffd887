// Torch wrappers of the router, CPU.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/parallel_torch.h"
#include "common/tensor_checks.h"
#include "routing/routing.h"
#include "routing/routing_torch.h"

namespace pruneops {
namespace {

const uint8_t* mask_data(const std::optional<Tensor>& target) {
  return target.has_value() ? static_cast<const uint8_t*>(target->const_data_ptr()) : nullptr;
}

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

Tensor empty_cpu_float32(int64_t size) {
  int64_t stride = 1;
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      1, &size, &stride, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

float* float_data(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

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
  Tensor logits = empty_cpu_float32(total);
  Tensor weights = empty_cpu_float32(total);

  RouterParams params{};
  params.x = rows_of(rows);
  params.weight = direction.const_data_ptr();
  params.bias = offset.has_value() ? scalar_value(*offset) : 0.0f;
  params.target = mask_data(mask);
  params.activation = checked_activation(activation);
  params.scale = static_cast<float>(scale);
  params.shift = static_cast<float>(shift);
  params.logits = float_data(logits);
  params.weights = float_data(weights);
  params.type = float_type(x);
  params.total = total;
  params.columns = columns;
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
  Tensor dx = empty_cpu_like_dtype(x, {total, columns});
  Tensor dweight = empty_cpu_like_dtype(x, {columns});
  Tensor dbias = empty_cpu_like_dtype(x, {1});
  Tensor scratch = empty_cpu_float32(total + router_blocks(total) * columns);

  RouterGradParams params{};
  params.dweights = static_cast<const float*>(upstream.const_data_ptr());
  params.logits = static_cast<const float*>(values.const_data_ptr());
  params.x = rows_of(rows);
  params.weight = direction.const_data_ptr();
  params.target = mask_data(mask);
  params.activation = checked_activation(activation);
  params.scale = static_cast<float>(scale);
  params.dx = dx.mutable_data_ptr();
  params.dweight = dweight.mutable_data_ptr();
  params.dbias = dbias.mutable_data_ptr();
  params.dlogits = float_data(scratch);
  params.partials = params.dlogits + total;
  params.type = float_type(x);
  params.total = total;
  params.columns = columns;
  router_weights_backward(params, torch_parallel());
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pruneops, CPU, m) {
  m.impl("router_weights", TORCH_BOX(&router_weights_cpu));
  m.impl("router_weights_backward", TORCH_BOX(&router_weights_backward_cpu));
}

}  // namespace pruneops
