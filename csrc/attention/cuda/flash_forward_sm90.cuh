// Attention forward on Hopper: asynchronous copies and products, in blocks of specialised warps
// that stay until all work is done (flash_forward_sm90_block.cuh).

#pragma once

#include "attention/cuda/flash_forward_sm90_consume.cuh"
#include "attention/cuda/flash_forward_sm90_feed.cuh"

namespace pruneops {

template <MmaType kType, int kHeadDim>
__global__ void __launch_bounds__(ForwardSm90<kHeadDim>::kThreads, 1)
    flash_forward_sm90_kernel(const __grid_constant__ FlashForwardParams p,
                              const __grid_constant__ FlashOrder order,
                              const __grid_constant__ TensorMap k_map,
                              const __grid_constant__ TensorMap v_map) {
  using Config = ForwardSm90<kHeadDim>;
  PRUNEOPS_SWIZZLED_SHARED(memory);
  const ForwardSharedSm90<kHeadDim> shared(memory);
  if (threadIdx.x == 0) shared.make_barriers();
  __syncthreads();
  // The same in all lanes of a warp; the shuffle says so to the compiler.
  const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpSize, 0);
  if (warp < kWarpgroup / kWarpSize) {
    give_registers<Config::kFeederRegisters>();
    if (warp == 0) {
      feed_keys<kHeadDim>(p, order, &k_map, &v_map, shared);
    } else if (warp <= Config::kConsumers) {
      feed_queries<kHeadDim>(p, shared, warp - 1);
    }
  } else {
    take_registers<Config::kConsumerRegisters>();
    consume<kType, kHeadDim>(p, shared, warp / (kWarpgroup / kWarpSize) - 1);
  }
}

// The map of keys or values, packed or in slots. Without rows it stays unused.
template <int kHeadDim>
cudaError_t make_keys_map(TensorMap* map, const RowView& view, const FlashForwardParams& p) {
  const FlashSegments& s = p.segments;
  const bool slots = s.seqused_k != nullptr;
  const int64_t num_slots = slots ? s.num_segments : 1, rows = slots ? s.capacity : s.total_k;
  if (num_slots * rows == 0) return cudaSuccess;
  return make_tensor_map<typename ForwardSm90<kHeadDim>::KeyTile>(
      map, {view.data, num_slots, rows, p.heads.num_heads_k, view.slot_stride, view.row_stride,
            view.head_stride});
}

template <int kHeadDim>
cudaError_t launch_flash_forward_sm90(const FlashForwardParams& p, const FlashDevice& device,
                                      cudaStream_t stream) {
  using Config = ForwardSm90<kHeadDim>;
  if (p.segments.total_q == 0) return cudaSuccess;
  const FlashOrder order = {false, Config::kTile.rows, static_cast<int32_t>(p.heads.group),
                            p.schedule};
  // First, since a launch makes the context current on this thread, without which the driver makes
  // no map.
  cudaError_t error = launch_flash_schedule(p.segments, &order, 1, stream);
  TensorMap k_map{}, v_map{};
  if (error == cudaSuccess) error = make_keys_map<kHeadDim>(&k_map, p.k, p);
  if (error == cudaSuccess) error = make_keys_map<kHeadDim>(&v_map, p.v, p);
  if (error != cudaSuccess) return error;
  const int64_t items =
      p.heads.num_heads_k * flash_most_tiles(p.segments.total_q, p.segments.num_segments, order);
  const auto kernel = p.q.type == FloatType::kBFloat16
                          ? flash_forward_sm90_kernel<MmaType::kBFloat16, kHeadDim>
                          : flash_forward_sm90_kernel<MmaType::kFloat16, kHeadDim>;
  const int64_t blocks = items < device.num_sms ? items : device.num_sms;
  return launch_kernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(Config::kThreads),
                       Config::kSharedBytes, stream, p, order, k_map, v_map);
}

}  // namespace pruneops
