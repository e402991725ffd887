// Attention of ragged segments on tensor cores, on a CUDA device: the torch-free interface of the
// forward pass, and of the schedule that the backward pass uses too.
//
// Lengths are known to the device only, so the host plans with totals. Every pass begins with one
// small launch, the schedule: it clamps what cu_seqlens and seqused_k say, orders the segments,
// those of the most work first, and counts their tiles. The blocks of the pass then look up which
// tile is theirs (flash_schedule.cuh). Results do not depend on the order.
//
// What every kernel promises:
//   bf16 and fp16, all of q, k, v, out alike, of head dims 64, 80, 96 and 128; any group
//   rows that begin on 16 bytes: data, row_stride, head_stride and slot_stride are multiples of 8
//   elements, in inputs and outputs; strides of rows and heads below 2^31 elements
//   nothing outside a segment reaches a result, and no value on the device leads out of bounds
//   every row of out and softmax_lse is written: 0 and -inf for a row that sees no key and for rows
//   outside of all segments
//   launches only, the same ones for every content of the tensors: fit for CUDA graphs

#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include "attention/attention.h"

namespace pruneops {

// Facts about the device the launch is for.
struct FlashDevice {
  int num_sms;
  int compute_capability;  // 10 * major + minor
  int max_shared_bytes;    // that a block may have if it asks
};

// Where the segments lie, as the caller says; any values are safe.
struct FlashSegments {
  const int32_t* cu_seqlens_q;  // [num_segments + 1]
  const int32_t* cu_seqlens_k;  // [num_segments + 1]; null with seqused_k
  const int32_t* seqused_k;     // [num_segments] keys in use of slot b, or null: keys are packed
  int64_t capacity;             // rows of a slot; 0 without seqused_k
  int64_t num_segments;
  int64_t total_q;  // rows of q
  int64_t total_k;  // rows of k; unused with seqused_k
};

// What the tiles of a schedule cut: the packed rows of a key head (query * group + head), or keys.
// Rows and keys of no segment have tiles too, in two segments of their own without keys or without
// queries, so that a kernel writes their zeros as it writes every other result.
struct FlashOrder {
  bool keys;
  int32_t tile;      // rows or keys of a tile
  int32_t group;     // of the heads; 1 for keys
  int32_t* scratch;  // [flash_schedule_ints], 16-byte aligned
};

constexpr int64_t flash_schedule_ints(int64_t num_segments) { return 8 * num_segments + 24; }

// No batch has more tiles than this. A pass has one work item per tile and key head.
//   total  rows of q, or of k for keys
constexpr int64_t flash_most_tiles(int64_t total, int64_t num_segments, const FlashOrder& order) {
  return (total * order.group + (num_segments + 2) * (order.tile - 1)) / order.tile;
}

// The blocks of a pass with one work item each; where no grid is that large, a number that a launch
// refuses.
inline unsigned flash_blocks(int64_t heads, int64_t total, int64_t num_segments,
                             const FlashOrder& order) {
  const int64_t items = heads * flash_most_tiles(total, num_segments, order);
  return items < int64_t{1} << 31 ? static_cast<unsigned>(items) : ~0u;
}

// Fills the scratch of one or two orders in one launch.
cudaError_t launch_flash_schedule(const FlashSegments& segments, const FlashOrder* orders,
                                  int num_orders, cudaStream_t stream);

struct FlashForwardParams {
  RowView q;           // [total_q, num_heads_q, head_dim]
  RowView k, v;        // [total_k, num_heads_k, head_dim], with seqused_k slots
                       // [num_segments, capacity, num_heads_k, head_dim]
  RowView out;         // [total_q, num_heads_q, head_dim]
  float* softmax_lse;  // [num_heads_q, total_q], natural logarithms
  Heads heads;
  FlashSegments segments;
  Visibility visibility;
  float softmax_scale;
  int32_t* schedule;  // scratch [flash_schedule_ints(num_segments)], 16-byte aligned
};

// Whether a kernel exists for this dtype and head dim (bf16 or fp16, 64, 80, 96 or 128).
inline bool flash_supports(FloatType type, int64_t head_dim) {
  return type != FloatType::kFloat32 &&
         (head_dim == 64 || head_dim == 80 || head_dim == 96 || head_dim == 128);
}

// Whether the kernels can read and write these rows in place: alignment and strides as above.
inline bool flash_reads(const RowView& rows) {
  const auto narrow = [](int64_t stride) { return stride == static_cast<int32_t>(stride); };
  return begins_on_16_bytes(rows) && narrow(rows.row_stride) && narrow(rows.head_stride);
}

// Two launches. Takes the sm_90a kernels on a device of compute capability 9.0 if they were
// compiled in (PRUNEOPS_WITH_SM90) and softmax_scale is positive, otherwise the sm_80 kernels,
// which run on any device since and take any scale.
cudaError_t launch_flash_forward(const FlashForwardParams& params, const FlashDevice& device,
                                 cudaStream_t stream);

// The kernels of one architecture and head dim, each in a file of its own; they launch the schedule
// for their tile themselves.
template <int kHeadDim>
cudaError_t launch_flash_forward_sm80(const FlashForwardParams& params, const FlashDevice& device,
                                      cudaStream_t stream);
template <int kHeadDim>
cudaError_t launch_flash_forward_sm90(const FlashForwardParams& params, const FlashDevice& device,
                                      cudaStream_t stream);

}  // namespace pruneops
