// What to run in which pieces: segments a kernel may rely on, and blocks of them, longest first.

#pragma once

#include <cstdint>
#include <vector>

#include "attention/attention.h"

namespace pruneops {

// Segments of packed queries against packed keys.
//   cu_seqlens_q, cu_seqlens_k  [batch + 1] any values
std::vector<Segment> packed_segments(const int32_t* cu_seqlens_q, const int32_t* cu_seqlens_k,
                                     int64_t batch, int64_t total_q, int64_t total_k);

// Segments of packed queries against cache slots.
//   cu_seqlens_q  [batch + 1] any values      seqused_k  [batch] any values
std::vector<Segment> slot_segments(const int32_t* cu_seqlens_q, const int32_t* seqused_k,
                                   int64_t batch, int64_t total_q, int64_t capacity);

// Blocks of the rows of a key head (queries x group), each of at most max_rows. They are made
// smaller when there would be too few for the threads; that changes no result.
std::vector<Block> forward_blocks(const std::vector<Segment>& segments, const Heads& heads,
                                  const Visibility& visibility, int64_t max_rows, int num_threads);

// The two forms of the backward pass, see BackwardParams.
struct BackwardBlocks {
  std::vector<Block> rows;
  std::vector<Block> keys;  // empty in the whole form
};
BackwardBlocks backward_blocks(const std::vector<Segment>& segments, const Heads& heads,
                               const Visibility& visibility, int64_t tile_rows, int64_t tile_keys,
                               int num_threads);

// Blocks of keys, each of at most max_keys and, when there are few, no fewer than min_keys.
std::vector<Block> key_blocks(const std::vector<Segment>& segments, const Visibility& visibility,
                              int64_t max_keys, int64_t min_keys, int64_t tasks_per_block,
                              int num_threads);

}  // namespace pruneops
