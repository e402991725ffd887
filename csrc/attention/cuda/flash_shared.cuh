// Tiles of rows in shared memory, [rows, head_dim] of 16-bit elements without padding, for any head
// dim that is a multiple of 16.
//
// A row is head_dim / 8 chunks of 16 bytes. ldmatrix reads one chunk of each of 8 rows at once; for
// them to lie in different banks, chunk c of row r stands in the place of chunk c ^ twist(r). Eight
// chunks fill all banks once. If a row has odd * 2^s chunks, 2^(3 - s) rows after each other begin
// at different banks by themselves and every 2^(3 - s)-th repeats them: the twist takes that
// repetition's number, which stays within groups of 2^s chunks and so within the row.

#pragma once

#include "attention/attention.h"
#include "common/cuda_async.cuh"

namespace pruneops {

constexpr int kChunkElements = 8;
constexpr int kChunkBytes = 16;

template <int kHeadDim>
struct TileLayout {
  static_assert(kHeadDim % 16 == 0, "fragments are 16 elements deep");
  static constexpr int kChunks = kHeadDim / kChunkElements;
  static constexpr int kRowBytes = kHeadDim * 2;
  static constexpr int kFreeBits = kChunks % 8 == 0 ? 3 : (kChunks % 4 == 0 ? 2 : 1);  // s
  static constexpr int kTwists = (1 << kFreeBits) - 1;

  PRUNEOPS_HOST_DEVICE static constexpr int twist(int row) {
    return row >> (3 - kFreeBits) & kTwists;
  }
  // Byte offset of a chunk in the tile.
  PRUNEOPS_HOST_DEVICE static constexpr int offset(int row, int chunk) {
    return row * kRowBytes + (chunk ^ twist(row)) * kChunkBytes;
  }
};

// Where one lane of an ldmatrix reads, from which the places of all further reads of the same tile
// follow by constants: the rows of a lane differ by multiples of 8, its chunks by multiples of 2.
template <int kHeadDim>
class LaneOffset {
 public:
  //   row    of the tile    chunk  0 or 1
  __device__ __forceinline__ LaneOffset(int row, int chunk)
      : row_(row * Layout::kRowBytes), chunk_(chunk ^ Layout::twist(row)) {}

  // Byte offset of the chunk that lies `rows` rows, a multiple of 8, and `chunks`, a multiple of 2,
  // further on.
  __device__ __forceinline__ int operator()(int rows, int chunks) const {
    const int twisted = chunks & Layout::kTwists, whole = chunks - twisted;
    return row_ + (chunk_ ^ twisted) * kChunkBytes + rows * Layout::kRowBytes + whole * kChunkBytes;
  }

 private:
  using Layout = TileLayout<kHeadDim>;
  int row_, chunk_;
};

// For ldmatrix of 16 x 16 elements in the order upper left, lower left, upper right, lower right:
// the `a` of a product, or, transposed, two `b` side by side whose rows are the tile's.
template <int kHeadDim>
__device__ __forceinline__ LaneOffset<kHeadDim> lane_down_first(int first_row) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  return {first_row + lane % 16, lane / 16};
}

// In the order upper left, upper right, lower left, lower right: two `b` side by side whose columns
// are the tile's rows.
template <int kHeadDim>
__device__ __forceinline__ LaneOffset<kHeadDim> lane_across_first(int first_row) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  return {first_row + lane / 16 * 8 + lane % 8, lane / 8 % 2};
}

__device__ __forceinline__ const void* byte_of(const uint16_t* tile, int offset) {
  return reinterpret_cast<const char*>(tile) + offset;
}
__device__ __forceinline__ void* byte_of(uint16_t* tile, int offset) {
  return reinterpret_cast<char*>(tile) + offset;
}

// Begins to copy rows [0, num_rows) into the tile and zeros into the rest of its kRows. kThreads
// threads take part, `thread` being the caller's number; committing the copies is up to the caller.
//   row_of(r, further)  address of row r + further in global memory, any address from num_rows on;
//                       `further` is a constant wherever that is possible
template <int kRows, int kHeadDim, int kThreads, class RowOf>
__device__ __forceinline__ void load_tile_async(uint16_t* tile, int thread, int num_rows,
                                                const RowOf& row_of) {
  using Layout = TileLayout<kHeadDim>;
  constexpr int kAll = kRows * Layout::kChunks;
  constexpr bool kWholeRows = kThreads % Layout::kChunks == 0;  // a step of all threads
#pragma unroll
  for (int i = 0; i < (kAll + kThreads - 1) / kThreads; ++i) {
    const int n = kWholeRows ? thread : thread + i * kThreads;
    const int row = n / Layout::kChunks, chunk = n % Layout::kChunks;
    const int further = kWholeRows ? i * (kThreads / Layout::kChunks) : 0;
    if (kAll % kThreads != 0 && row + further >= kRows) break;
    copy_16_bytes_async(byte_of(tile, Layout::offset(row + further, chunk)),
                        row_of(row, further) + chunk * kChunkElements, row + further < num_rows);
  }
}

// Row 0 of one head; the others follow at `stride` elements.
struct TileSource {
  const uint16_t* data;
  int64_t stride;

  __device__ __forceinline__ const uint16_t* operator()(int row, int further) const {
    return data + row * stride + further * stride;
  }
};

// Strides fit into 32 bits (flash_reads), so that a product with one is a single instruction.
__device__ __forceinline__ int64_t narrow_stride(int64_t stride) {
  return static_cast<int32_t>(stride);
}

// Rows of a head of packed tensors, or of the cache slot of a segment.
__device__ __forceinline__ TileSource tile_source(const RowView& view, int64_t slot, int64_t row,
                                                  int64_t head) {
  return {static_cast<const uint16_t*>(view.data) + slot * view.slot_stride +
              row * view.row_stride + head * view.head_stride,
          narrow_stride(view.row_stride)};
}

// The (query, head) pairs that consecutive packed rows of a key head stand for, from `first_row` of
// its segment on: row r = query * group + head.
struct PackedRows {
  int64_t first_query;  // of the segment
  int first_head;       // of the group
  int group;
  uint32_t inverse;  // 2^32 / group rounded up, exact for all that a tile asks

  PackedRows() = default;
  // Rows are counted in 32 bits: 2^31 packed rows of 64 elements would be 256 GiB.
  PRUNEOPS_HOST_DEVICE PackedRows(int64_t first_row, int64_t heads_of_group)
      : first_query(static_cast<uint32_t>(first_row) / static_cast<uint32_t>(heads_of_group)),
        first_head(static_cast<int>(first_row - first_query * heads_of_group)),
        group(static_cast<int>(heads_of_group)),
        inverse(0xffffffffu / static_cast<uint32_t>(heads_of_group) + 1) {}

  // The query of row first_row + r, counted from first_query, and its head in the group.
  PRUNEOPS_HOST_DEVICE void locate(int r, int& query, int& head) const {
    const uint32_t n = static_cast<uint32_t>(first_head + r);
    query = static_cast<int>(group == 1 ? n : static_cast<uint32_t>(uint64_t{n} * inverse >> 32));
    head = static_cast<int>(n) - query * group;
  }
};

// Rows of all heads of a group, packed: row r is a (query, head) pair of `rows`.
struct PackedSource {
  uint16_t* data;  // row first_query of the group's first head
  int64_t row_stride, head_stride;
  PackedRows rows;

  __device__ __forceinline__ int64_t offset(int r) const {
    int query, head;
    rows.locate(r, query, head);
    return query * row_stride + head * head_stride;
  }
  __device__ __forceinline__ const uint16_t* operator()(int r, int further) const {
    return data + offset(r + further);
  }
};

//   q_begin  first row of the segment
__device__ __forceinline__ PackedSource packed_source(const RowView& view, int64_t q_begin,
                                                      int64_t head_k, const PackedRows& rows) {
  return {static_cast<uint16_t*>(view.data) + (q_begin + rows.first_query) * view.row_stride +
              head_k * rows.group * view.head_stride,
          narrow_stride(view.row_stride), narrow_stride(view.head_stride), rows};
}

}  // namespace pruneops
