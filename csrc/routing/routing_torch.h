// What the torch wrappers of the router check and fill in on every device.

#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "common/tensor_checks.h"
#include "routing/routing.h"

namespace pruneops {

inline Activation checked_activation(const std::string& name) {
  if (name == "tanh") return Activation::kTanh;
  if (name == "sigmoid") return Activation::kSigmoid;
  STD_TORCH_CHECK(name == "none", "activation must be tanh, sigmoid or none, got ", name);
  return Activation::kNone;
}

// x: [total, columns], which everything else takes its dtype and sizes from.
inline void check_router_input(const Tensor& x) {
  check_dim(x, 2, "x");
  check_floating(x, "x");
  STD_TORCH_CHECK(x.size(0) <= kMaxRows, "x has ", x.size(0), " rows; at most ", kMaxRows,
                  " are supported");
}

// The part of RouterParams and CudaRouterParams that is the same. Tensors are checked.
template <class Params>
Params router_params(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& target,
                     const std::string& activation, double scale, double shift,
                     const Tensor& logits, const Tensor& weights) {
  Params params{};
  params.x = rows_of(x);
  params.weight = weight.const_data_ptr();
  params.target = const_data_of<uint8_t>(target);
  params.activation = checked_activation(activation);
  params.scale = static_cast<float>(scale);
  params.shift = static_cast<float>(shift);
  params.logits = data_of<float>(logits);
  params.weights = data_of<float>(weights);
  params.type = float_type(x);
  params.total = x.size(0);
  params.columns = x.size(1);
  return params;
}

// The same of RouterGradParams and CudaRouterGradParams.
template <class Params>
Params router_grad_params(const Tensor& dweights, const Tensor& logits, const Tensor& x,
                          const Tensor& weight, const std::optional<Tensor>& target,
                          const std::string& activation, double scale, const Tensor& dx,
                          const Tensor& dweight, const Tensor& dbias) {
  Params params{};
  params.dweights = const_data_of<float>(dweights);
  params.logits = const_data_of<float>(logits);
  params.x = rows_of(x);
  params.weight = weight.const_data_ptr();
  params.target = const_data_of<uint8_t>(target);
  params.activation = checked_activation(activation);
  params.scale = static_cast<float>(scale);
  params.dx = dx.mutable_data_ptr();
  params.dweight = dweight.mutable_data_ptr();
  params.dbias = dbias.mutable_data_ptr();
  params.type = float_type(x);
  params.total = x.size(0);
  params.columns = x.size(1);
  return params;
}

}  // namespace pruneops
