// Describes a tensor to Hopper's asynchronous copies: made on the host, handed to the kernel.

#pragma once

#include "common/cuda_kernel.h"
#include "common/sm90_panels.h"

#ifdef PRUNEOPS_CUDA_ON_HOST
#include "sm90.h"
#else
#include <cuda.h>
#endif

namespace pruneops {

// What the hardware reads. A kernel takes it by value as `const __grid_constant__ TensorMap`.
struct alignas(128) TensorMap {
  uint64_t words[16];
};

// Rows of 16-bit elements, in slots or without (then there is one slot).
//   data  [slots, rows, heads, head_dim], on 16 bytes, last stride 1, the others in elements and
//         multiples of 8
struct RowsTensor {
  const void* data;
  int64_t slots, rows, heads;
  int64_t slot_stride, row_stride, head_stride;
};

// The geometry that the hardware wants: `sizes` and box of 5 dimensions, the innermost first,
// strides in bytes of all but the innermost.
struct TensorGeometry {
  const void* base;
  uint64_t sizes[5];
  uint64_t strides[4];
  uint32_t box[5];
};

// A load takes a box at 5 coordinates and fills with zeros what lies outside of the sizes. The rows
// have two dimensions here, of the same stride, whose coordinates add up: the inner one is as long
// as a tile and starts one tile before the tensor. A box at (kRows - valid, row + valid) of these
// begins at row (kRows - valid) - kRows + (row + valid) = row, and has only `valid` rows inside the
// inner dimension: so a load ends where a segment ends, although the tensor goes on. No address
// before the tensor is ever formed for a row inside.
template <class Tile>
TensorGeometry tensor_geometry(const RowsTensor& tensor) {
  constexpr uint64_t kElement = 2;
  const uint64_t row = static_cast<uint64_t>(tensor.row_stride) * kElement;
  // The stride of a dimension with one entry is of no use, but has to be a legal one.
  const auto stride = [](int64_t size, int64_t elements) {
    return size > 1 ? static_cast<uint64_t>(elements) * kElement : uint64_t{16};
  };
  const auto size = [](int64_t n) { return static_cast<uint64_t>(n > 1 ? n : 1); };
  TensorGeometry g{};
  g.base = reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(tensor.data) -
                                         static_cast<uintptr_t>(Tile::kRows) * row);
  const uint64_t sizes[] = {Tile::kColumns, Tile::kRows, size(tensor.rows) + 1, size(tensor.heads),
                            size(tensor.slots)};
  const uint64_t strides[] = {row, row, stride(tensor.heads, tensor.head_stride),
                              stride(tensor.slots, tensor.slot_stride)};
  const uint32_t box[] = {Tile::kWidth, Tile::kRows, 1, 1, 1};
  for (int i = 0; i < 5; ++i) g.sizes[i] = sizes[i], g.box[i] = box[i];
  for (int i = 0; i < 4; ++i) g.strides[i] = strides[i];
  return g;
}

#ifdef PRUNEOPS_CUDA_ON_HOST

inline cudaError_t encode_tensor_map(TensorMap* map, const TensorGeometry& g, int row_bytes) {
  const bool legal =
      cuda_on_host::make_box_map(map->words, g.base, g.sizes, g.strides, g.box, row_bytes);
  return legal ? cudaSuccess : cudaErrorInvalidValue;
}

#else

// Through the driver's own function, found at run time: the library links no libcuda.
inline cudaError_t encode_tensor_map(TensorMap* map, const TensorGeometry& g, int row_bytes) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) &&
                alignof(TensorMap) >= alignof(CUtensorMap));
  using Encode =
      CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                   const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                   CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    constexpr const char* kName = "cuTensorMapEncodeTiled";
#if CUDART_VERSION >= 12050
    constexpr unsigned kSince = 12000;  // the CUDA version that brought it
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion(kName, &function, kSince, cudaEnableDefault, &found);
#else
    const cudaError_t error = cudaGetDriverEntryPoint(kName, &function, cudaEnableDefault, &found);
#endif
    const bool usable = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return usable ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  const CUtensorMapSwizzle swizzle = row_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : row_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                       : CU_TENSOR_MAP_SWIZZLE_32B;
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  // It moves bits, whatever they mean.
  const CUresult result = encode(
      reinterpret_cast<CUtensorMap*>(map), CU_TENSOR_MAP_DATA_TYPE_UINT16, 5,
      const_cast<void*>(g.base), g.sizes, g.strides, g.box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_ERROR_INVALID_CONTEXT) return cudaErrorDeviceUninitialized;
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

#endif

// The map for loads of `Tile`s (PanelTile<...>) from a tensor. No work for the device.
template <class Tile>
cudaError_t make_tensor_map(TensorMap* map, const RowsTensor& tensor) {
  static_assert(Tile::kRows <= 256);
  return encode_tensor_map(map, tensor_geometry<Tile>(tensor), Tile::kRowBytes);
}

}  // namespace pruneops
