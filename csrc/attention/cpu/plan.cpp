#include "attention/cpu/plan.h"

#include <algorithm>

#include "common/segments.h"

namespace pruneops {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Keys that query `query` of the segment sees, or an upper bound where they come from kv_limit.
int64_t visible_keys(const Segment& segment, const Visibility& visibility, int64_t query) {
  if (visibility.kv_limit != nullptr || !visibility.causal) return segment.k_len;
  return std::clamp<int64_t>(segment.k_len - segment.q_len + query + 1, 0, segment.k_len);
}

// Cuts [0, length) of a segment into pieces of nearly equal size, each a multiple of `step` but the
// last.
void append_blocks(std::vector<Block>& blocks, int64_t segment, int64_t length, int64_t most,
                   int64_t step) {
  if (length == 0) return;
  const int64_t pieces = ceil_div(length, most);
  const int64_t size = ceil_div(ceil_div(length, pieces), step) * step;
  for (int64_t begin = 0; begin < length; begin += size) {
    blocks.push_back({segment, begin, std::min(begin + size, length)});
  }
}

template <class Cost>
void sort_longest_first(std::vector<Block>& blocks, const Cost& cost) {
  std::stable_sort(blocks.begin(), blocks.end(),
                   [&](const Block& a, const Block& b) { return cost(a) > cost(b); });
}

// Halves `size` while `total` split into such pieces gives the threads too few tasks to share.
int64_t piece_size(int64_t size, int64_t smallest, int64_t total, int64_t tasks_per_piece,
                   int num_threads) {
  while (size / 2 >= smallest && ceil_div(total, size) * tasks_per_piece < 4 * num_threads) {
    size /= 2;
  }
  return size;
}

}  // namespace

std::vector<Segment> packed_segments(const int32_t* cu_seqlens_q, const int32_t* cu_seqlens_k,
                                     int64_t batch, int64_t total_q, int64_t total_k) {
  std::vector<int32_t> q(batch + 1), k(batch + 1);
  sanitize_cu_seqlens(cu_seqlens_q, batch + 1, total_q, q.data());
  sanitize_cu_seqlens(cu_seqlens_k, batch + 1, total_k, k.data());
  std::vector<Segment> segments(batch);
  for (int64_t b = 0; b < batch; ++b) {
    segments[b] = {q[b], q[b + 1] - q[b], k[b], k[b + 1] - k[b], 0};
  }
  return segments;
}

std::vector<Segment> slot_segments(const int32_t* cu_seqlens_q, const int32_t* seqused_k,
                                   int64_t batch, int64_t total_q, int64_t capacity) {
  std::vector<int32_t> q(batch + 1);
  sanitize_cu_seqlens(cu_seqlens_q, batch + 1, total_q, q.data());
  std::vector<Segment> segments(batch);
  for (int64_t b = 0; b < batch; ++b) {
    segments[b] = {q[b], q[b + 1] - q[b], 0, std::clamp<int64_t>(seqused_k[b], 0, capacity), b};
  }
  return segments;
}

std::vector<Block> forward_blocks(const std::vector<Segment>& segments, const Heads& heads,
                                  const Visibility& visibility, int64_t max_rows, int num_threads) {
  int64_t total = 0;
  for (const Segment& s : segments) total += s.q_len * heads.group;
  constexpr int64_t kSmallestRows = 36;
  const int64_t rows = piece_size(max_rows, kSmallestRows, total, heads.num_heads_k, num_threads);
  std::vector<Block> blocks;
  for (size_t b = 0; b < segments.size(); ++b) {
    // A multiple of 12 is whole register blocks on every instruction set.
    append_blocks(blocks, static_cast<int64_t>(b), segments[b].q_len * heads.group, rows, 12);
  }
  sort_longest_first(blocks, [&](const Block& block) {
    const Segment& s = segments[block.segment];
    return (block.end - block.begin) * visible_keys(s, visibility, (block.end - 1) / heads.group);
  });
  return blocks;
}

BackwardBlocks backward_blocks(const std::vector<Segment>& segments, const Heads& heads,
                               const Visibility& visibility, int64_t tile_rows, int64_t tile_keys,
                               int num_threads) {
  BackwardBlocks result;
  int64_t total = 0, largest = 0;
  for (size_t b = 0; b < segments.size(); ++b) {
    const int64_t cost = segments[b].q_len * segments[b].k_len;
    total += cost * heads.num_heads_k;
    largest = std::max(largest, cost);
    result.rows.push_back({static_cast<int64_t>(b), 0, segments[b].q_len * heads.group});
  }
  // Time is the longest task or an even share of all, whichever is more; a tile costs 5 products in
  // the whole form and 7 in the split one, whose tasks are small.
  const bool whole = 5 * largest * num_threads <= 7 * total;
  if (whole) {
    sort_longest_first(result.rows, [&](const Block& block) {
      return segments[block.segment].q_len * segments[block.segment].k_len;
    });
    return result;
  }
  result.rows.clear();
  for (size_t b = 0; b < segments.size(); ++b) {
    const int64_t segment = static_cast<int64_t>(b);
    append_blocks(result.rows, segment, segments[b].q_len * heads.group, tile_rows, tile_rows);
    append_blocks(result.keys, segment, segments[b].k_len, tile_keys, tile_keys);
  }
  sort_longest_first(result.rows, [&](const Block& block) {
    return visible_keys(segments[block.segment], visibility, (block.end - 1) / heads.group);
  });
  sort_longest_first(result.keys,
                     [&](const Block& block) { return segments[block.segment].q_len; });
  return result;
}

std::vector<Block> key_blocks(const std::vector<Segment>& segments, const Visibility& visibility,
                              int64_t max_keys, int64_t min_keys, int64_t tasks_per_block,
                              int num_threads) {
  int64_t total = 0;
  for (const Segment& s : segments) total += s.k_len;
  const int64_t keys = piece_size(max_keys, min_keys, total, tasks_per_block, num_threads);
  std::vector<Block> blocks;
  for (size_t b = 0; b < segments.size(); ++b) {
    append_blocks(blocks, static_cast<int64_t>(b), segments[b].k_len, keys, min_keys);
  }
  sort_longest_first(blocks, [&](const Block& block) {
    const Segment& s = segments[block.segment];
    const bool triangle = visibility.causal && visibility.kv_limit == nullptr;
    // Rows that see the block's first key.
    const int64_t unseen = triangle ? s.q_len - s.k_len + block.begin : 0;
    return (block.end - block.begin) * (s.q_len - std::clamp<int64_t>(unseen, 0, s.q_len));
  });
  return blocks;
}

}  // namespace pruneops
