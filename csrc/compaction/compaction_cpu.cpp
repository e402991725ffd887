// Torch wrappers of the compaction kernels, CPU.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/parallel_torch.h"
#include "common/tensor_checks.h"
#include "compaction/compaction.h"
#include "compaction/compaction_torch.h"
#include "selection/selection_cpu.h"

namespace pruneops {
namespace {

// Extent of dimension 0 of the tensors, all on the CPU; -1 if there is no tensor.
int64_t check_row_tensors(const std::vector<Tensor>& tensors) {
  for (const Tensor& t : tensors) check_cpu(t, "every tensor of tensors");
  return check_same_rows(tensors);
}

// For each tensor a new dense one with rows tensors[t][indices[i]].
//   indices  [num_rows], int32; out of range means a zero row
std::vector<Tensor> gather(const std::vector<Tensor>& tensors, const int32_t* indices,
                           int64_t num_rows, int64_t num_src_rows) {
  std::vector<Tensor> sources;
  std::vector<Tensor> outputs;
  std::vector<RowCopy> copies;
  sources.reserve(tensors.size());
  outputs.reserve(tensors.size());
  copies.reserve(tensors.size());
  for (const Tensor& tensor : tensors) {
    sources.push_back(rows_are_dense(tensor) ? tensor : torch::stable::contiguous(tensor));
    const Tensor& source = sources.back();
    const int64_t row_stride = source.stride(0) * static_cast<int64_t>(source.element_size());
    outputs.push_back(empty_cpu_like_dtype(source, sizes_with_rows(source, num_rows)));
    copies.push_back(RowCopy{static_cast<const char*>(source.const_data_ptr()), row_stride,
                             static_cast<char*>(outputs.back().mutable_data_ptr()),
                             bytes_per_row(source)});
  }
  gather_rows(GatherParams{copies.data(), static_cast<int64_t>(copies.size()), indices, num_rows,
                           num_src_rows},
              torch_parallel());
  return outputs;
}

std::vector<Tensor> gather_rows_cpu(const std::vector<Tensor>& tensors, const Tensor& indices) {
  const int64_t num_src_rows = check_row_tensors(tensors);
  const Tensor idx = checked_vector(indices, ScalarType::Int, -1, "indices");
  return gather(tensors, static_cast<const int32_t*>(idx.const_data_ptr()), idx.size(0),
                num_src_rows);
}

std::vector<Tensor> scatter_rows_cpu(const std::vector<Tensor>& tensors, const Tensor& indices,
                                     int64_t total) {
  const int64_t num_rows = check_row_tensors(tensors);
  const Tensor idx = checked_vector(indices, ScalarType::Int, num_rows, "indices");
  STD_TORCH_CHECK(total >= 0 && total <= kMaxRows, "total must be in [0, ", kMaxRows, "], got ",
                  total);
  std::vector<int32_t> inverse(static_cast<size_t>(total));
  invert_indices(static_cast<const int32_t*>(idx.const_data_ptr()), idx.size(0), inverse.data(),
                 total);
  return gather(tensors, inverse.data(), total, num_rows);
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> select_compact_cpu(
    const Tensor& scores, const std::vector<Tensor>& tensors, const Tensor& cu_seqlens,
    const Tensor& keep_counts, int64_t capacity, const std::optional<Tensor>& protect) {
  const int64_t num_src_rows = check_row_tensors(tensors);
  if (num_src_rows >= 0) check_size(tensors[0], 0, scores.numel(), "every tensor of tensors");
  auto [indices, cu_seqlens_out] =
      segment_topk_cpu(scores, cu_seqlens, keep_counts, capacity, protect);
  std::vector<Tensor> rows = gather(tensors, static_cast<const int32_t*>(indices.const_data_ptr()),
                                    capacity, num_src_rows);
  return {std::move(rows), indices, cu_seqlens_out};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pruneops, CPU, m) {
  m.impl("gather_rows", TORCH_BOX(&gather_rows_cpu));
  m.impl("scatter_rows", TORCH_BOX(&scatter_rows_cpu));
  m.impl("select_compact", TORCH_BOX(&select_compact_cpu));
}

}  // namespace pruneops
