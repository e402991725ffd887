// Gradients of attention of ragged segments on tensor cores, on a CUDA device: the torch-free
// interface. Segments, schedule and promises are those of flash.h, without cache slots.
//
// With P the probabilities and all sums over what a row sees:
//   delta = rowsum(dout out) - dlse     dS = P (dout V^T - delta)
//   dv = P^T dout     dk = scale dS^T q     dq = scale dS k
// P and dS are rounded to the dtype of the inputs before their products, sums are in float.
// One pass makes the two numbers that the others need of a row, a second one holds keys and sums
// over rows, all heads of their group among them, a third one holds rows and sums over keys. The
// scores are computed in both, which costs 7 products where 5 would do, and buys fixed orders of
// addition: results are the same bits in every run.

#pragma once

#include "attention/cuda/flash.h"

namespace pruneops {

// What the gradient needs of a row of out beside the inputs, 8 bytes.
struct FlashRowTerms {
  float log2_lse;  // LSE times log2(e), +inf for a row that sees no key: its probabilities are 0
  float delta;     // 0 for such a row
};

// They lie as [num_heads_k, total_q * group], the rows of a key head in their packed order, query *
// group + head, and are copied in pairs.
constexpr int64_t flash_row_terms(int64_t total_q, int64_t num_heads_q) {
  return (total_q * num_heads_q + 1) / 2 * 2;
}

struct FlashBackwardParams {
  RowView dout, q, k, v, out;  // as in FlashForwardParams, keys packed
  const float* softmax_lse;    // [num_heads_q, total_q] from the forward pass
  const float* dsoftmax_lse;   // [num_heads_q, total_q] or null: 0
  RowView dq, dk, dv;          // every row is written
  Heads heads;
  FlashSegments segments;  // seqused_k null
  Visibility visibility;
  float softmax_scale;
  FlashRowTerms* row_terms;  // scratch [flash_row_terms(...)], 16-byte aligned
  int32_t* schedule;         // scratch [2 * flash_schedule_ints(num_segments)], 16-byte aligned
};

// Four launches, for the dtypes and head dims of flash_supports(). Takes the sm_90a kernels on a
// device of compute capability 9.0 if they were compiled in (PRUNEOPS_WITH_SM90), otherwise the
// sm_80 kernels, which run on any device since.
cudaError_t launch_flash_backward(const FlashBackwardParams& params, const FlashDevice& device,
                                  cudaStream_t stream);

// The kernels of one head dim, each in a file of its own.
template <int kHeadDim>
cudaError_t launch_flash_backward_sm80(const FlashBackwardParams& params, const FlashDevice& device,
                                       cudaStream_t stream);
template <int kHeadDim>
cudaError_t launch_flash_backward_sm90(const FlashBackwardParams& params, const FlashDevice& device,
                                       cudaStream_t stream);

}  // namespace pruneops
