// Asynchronous copies of Hopper: one thread asks for a whole tile of rows, which lands in shared
// memory in panels (sm90_panels.h) and tells a barrier.

#pragma once

#include "common/sm90_barrier.cuh"
#include "common/sm90_panels.h"
#include "common/sm90_tensor_map.h"

// PRUNEOPS_SWIZZLED_SHARED(name): the block's dynamic shared memory as `unsigned char* name`,
// aligned for tiles. Not together with PRUNEOPS_DYNAMIC_SHARED in one kernel.
#ifdef PRUNEOPS_CUDA_ON_HOST
#define PRUNEOPS_SWIZZLED_SHARED(name) \
  unsigned char* name = static_cast<unsigned char*>(cuda_on_host::Block::current().shared())
#else
#define PRUNEOPS_SWIZZLED_SHARED(name)                                       \
  extern __shared__ __align__(1024) unsigned char swizzled_dynamic_shared[]; \
  unsigned char* name = swizzled_dynamic_shared
#endif

namespace pruneops {

// Where rows are in a tensor that a TensorMap describes.
struct RowsAt {
  int row;    // the first one, in its slot, or in the tensor without slots
  int valid;  // so many rows are read, at most the tile's; the rest of the tile becomes zero
  int head;
  int slot;  // 0 without slots
};

// Asks for rows `at` of a tensor: they land in `tile` (a Tile = PanelTile<...> like the map's),
// which nobody else may still be using. The whole tile is written, rows past the valid ones with
// zeros (their memory is not read, whatever it holds), so `barrier` is to expect Tile::kBytes.
// Called by one thread, after arrive_expecting() of the same phase or before. `map` is a kernel
// parameter declared `const __grid_constant__ TensorMap`, or in global memory.
//
// The clipping is done by the hardware, see make_tensor_map().
template <class Tile>
__device__ __forceinline__ void load_rows_async(void* tile, const TensorMap* map, uint64_t* barrier,
                                                RowsAt at) {
#pragma unroll
  for (int panel = 0; panel < Tile::kPanels; ++panel) {
    unsigned char* to = static_cast<unsigned char*>(tile) + panel * Tile::kPanelBytes;
    const int column = panel * Tile::kWidth, clip = Tile::kRows - at.valid;
    const int row = at.row + at.valid;
#ifdef PRUNEOPS_CUDA_ON_HOST
    cuda_on_host::load_box_async(to, map->words, barrier, {column, clip, row, at.head, at.slot});
#else
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4, %5, %6}], [%7];"
        :
        : "r"(shared_address(to)), "l"(map), "r"(column), "r"(clip), "r"(row), "r"(at.head),
          "r"(at.slot), "r"(shared_address(barrier))
        : "memory");
#endif
  }
}

// Fetches the map itself ahead of the first load.
__device__ __forceinline__ void prefetch_tensor_map(const TensorMap* map) {
#ifdef PRUNEOPS_CUDA_ON_HOST
  (void)map;
#else
  asm volatile("prefetch.tensormap [%0];" : : "l"(map) : "memory");
#endif
}

// Makes what this thread wrote to shared memory itself (stores, cp.async after their wait) visible
// to tensor cores and asynchronous copies, which may also overwrite it afterwards. Called by every
// thread that wrote, before the barrier after which others use the data.
__device__ __forceinline__ void fence_async_proxy() {
#ifdef PRUNEOPS_CUDA_ON_HOST
  cuda_on_host::fence_async_proxy();
#else
  asm volatile("fence.proxy.async.shared::cta;" : : : "memory");
#endif
}

}  // namespace pruneops
