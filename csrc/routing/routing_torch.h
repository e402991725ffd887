// What the torch wrappers of the router check on every device.

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

}  // namespace pruneops
