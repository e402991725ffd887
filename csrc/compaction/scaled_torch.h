// What the torch wrappers of the weighted rows check and fill in on every device.

#pragma once

#include <cstdint>

#include "common/tensor_checks.h"

namespace pruneops {

// x: [total, columns], which everything else takes its dtype and sizes from.
inline void check_scaled_input(const Tensor& x) {
  check_floating(x, "x");
  check_dim(x, 2, "x");
  STD_TORCH_CHECK(x.size(0) <= kMaxRows, "x has ", x.size(0), " rows; at most ", kMaxRows,
                  " are supported");
}

// The part of ScatterScaledParams and CudaScatterScaledParams that is the same. Tensors are
// checked.
template <class Params>
Params scatter_scaled_params(const Tensor& x, const Tensor& residual, const Tensor& branch,
                             const Tensor& weights, const Tensor& out) {
  Params params{};
  params.x = rows_of(x);
  params.residual = rows_of(residual);
  params.branch = rows_of(branch);
  params.weights = const_data_of<float>(weights);
  params.out = out.mutable_data_ptr();
  params.type = float_type(x);
  params.total = x.size(0);
  params.columns = x.size(1);
  return params;
}

// The same of ScatterScaledGradParams and CudaScatterScaledGradParams.
template <class Params>
Params scatter_scaled_grad_params(const Tensor& dout, const Tensor& x, const Tensor& branch,
                                  const Tensor& weights, const Tensor& indices, const Tensor& dx,
                                  const Tensor& dresidual, const Tensor& dbranch,
                                  const Tensor& dweights) {
  Params params{};
  params.dout = rows_of(dout);
  params.x = rows_of(x);
  params.branch = rows_of(branch);
  params.weights = const_data_of<float>(weights);
  params.indices = const_data_of<int32_t>(indices);
  params.dx = dx.mutable_data_ptr();
  params.dresidual = dresidual.mutable_data_ptr();
  params.dbranch = dbranch.mutable_data_ptr();
  params.dweights = data_of<float>(dweights);
  params.type = float_type(x);
  params.total = x.size(0);
  params.kept = indices.size(0);
  params.columns = x.size(1);
  return params;
}

}  // namespace pruneops
