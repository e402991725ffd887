// Torch wrappers of the weighted rows, CPU.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

#include "common/parallel_torch.h"
#include "common/tensor_checks.h"
#include "compaction/compaction.h"
#include "compaction/scaled.h"
#include "compaction/scaled_torch.h"

namespace pruneops {
namespace {

Tensor cpu_matrix(const Tensor& t, const Tensor& like, int64_t rows, int64_t columns,
                  const char* name) {
  check_cpu(t, name);
  return checked_matrix(t, like.scalar_type(), rows, columns, name);
}

std::vector<int32_t> inverse_of(const Tensor& indices, int64_t total) {
  std::vector<int32_t> source(static_cast<size_t>(total));
  invert_indices(static_cast<const int32_t*>(indices.const_data_ptr()), indices.size(0),
                 source.data(), total);
  return source;
}

Tensor scatter_scaled_cpu(const Tensor& x, const Tensor& residual, const Tensor& branch,
                          const Tensor& weights, const Tensor& indices) {
  check_cpu(x, "x");
  check_scaled_input(x);
  const int64_t total = x.size(0), columns = x.size(1);
  const Tensor idx = checked_vector(indices, ScalarType::Int, -1, "indices");
  const Tensor w = checked_vector(weights, ScalarType::Float, total, "weights");
  const Tensor rows = cpu_matrix(x, x, total, columns, "x");
  const Tensor base = cpu_matrix(residual, x, idx.size(0), columns, "residual");
  const Tensor added = cpu_matrix(branch, x, idx.size(0), columns, "branch");
  Tensor out = empty_cpu_like_dtype(x, {total, columns});

  const std::vector<int32_t> source = inverse_of(idx, total);
  ScatterScaledParams params =
      scatter_scaled_params<ScatterScaledParams>(rows, base, added, w, out);
  params.source = source.data();
  scatter_scaled(params, torch_parallel());
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> scatter_scaled_backward_cpu(const Tensor& dout,
                                                                       const Tensor& x,
                                                                       const Tensor& branch,
                                                                       const Tensor& weights,
                                                                       const Tensor& indices) {
  check_cpu(x, "x");
  check_scaled_input(x);
  const int64_t total = x.size(0), columns = x.size(1);
  const Tensor idx = checked_vector(indices, ScalarType::Int, -1, "indices");
  const int64_t kept = idx.size(0);
  const Tensor w = checked_vector(weights, ScalarType::Float, total, "weights");
  const Tensor upstream = cpu_matrix(dout, x, total, columns, "dout");
  const Tensor rows = cpu_matrix(x, x, total, columns, "x");
  const Tensor added = cpu_matrix(branch, x, kept, columns, "branch");
  Tensor dx = empty_cpu_like_dtype(x, {total, columns});
  Tensor dresidual = empty_cpu_like_dtype(x, {kept, columns});
  Tensor dbranch = empty_cpu_like_dtype(x, {kept, columns});
  Tensor dweights = empty_cpu_like_dtype(w, {total});

  const std::vector<int32_t> source = inverse_of(idx, total);
  ScatterScaledGradParams params = scatter_scaled_grad_params<ScatterScaledGradParams>(
      upstream, rows, added, w, idx, dx, dresidual, dbranch, dweights);
  params.source = source.data();
  scatter_scaled_backward(params, torch_parallel());
  return {dx, dresidual, dbranch, dweights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pruneops, CPU, m) {
  m.impl("scatter_scaled", TORCH_BOX(&scatter_scaled_cpu));
  m.impl("scatter_scaled_backward", TORCH_BOX(&scatter_scaled_backward_cpu));
}

}  // namespace pruneops
