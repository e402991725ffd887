// Attention over packed sequences and cache slots, without torch: the arguments of every kernel and
// the table that holds the kernels of one instruction set.
//
// Names used throughout:
//   query head h belongs to key head h / group, group = num_heads_q / num_heads_k
//   a "row" of a key head's work is one (query, head of its group) pair, row r = query * group +
//   head, so the heads that share keys are processed against one loaded key tile limit of a query =
//   number of leading keys of its segment that it sees

#pragma once

#include <stdint.h>

#include "common/cpu_features.h"
#include "common/float_types.h"
#include "common/parallel.h"

namespace pruneops {

constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kMaxHeads = 65535;  // a dimension of a CUDA grid

// head_dim rounded up to the widest vector: the row length of fp32 scratch that outlives a tile.
static inline int64_t padded_head_dim(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }

// Rows of heads. Element (slot, row, head, d) is at
// data[slot * slot_stride + row * row_stride + head * head_stride + d]; strides count elements.
struct RowView {
  void* data;
  int64_t slot_stride;  // 0 when rows are packed
  int64_t row_stride;
  int64_t head_stride;
  FloatType type;
};

// Whether every row of a head may be read 16 bytes at a time.
static inline bool begins_on_16_bytes(const RowView& view) {
  const int64_t elements = 16 / element_size(view.type);
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && view.slot_stride % elements == 0 &&
         view.row_stride % elements == 0 && view.head_stride % elements == 0;
}

// One sequence of the batch: rows [q_begin, q_begin + q_len) of the queries, rows
// [k_begin, k_begin + k_len) of slot `slot` of the keys.
struct Segment {
  int64_t q_begin;
  int64_t q_len;
  int64_t k_begin;
  int64_t k_len;
  int64_t slot;
};

// A piece of one segment: rows of a key head, keys, or a split of keys, as the kernel defines it.
struct Block {
  int64_t segment;
  int64_t begin;
  int64_t end;
};

// Which keys a query sees.
struct Visibility {
  bool causal;              // aligned to the last query and the last key
  const int32_t* kv_limit;  // [total_q] or null; replaces causal
};

struct Heads {
  int64_t num_heads_q;
  int64_t num_heads_k;
  int64_t head_dim;
  int64_t group;  // num_heads_q / num_heads_k
};

struct ForwardParams {
  RowView q;           // [total_q, num_heads_q, head_dim]
  RowView k, v;        // [total_k or slots, num_heads_k, head_dim]; v unused without out
  RowView out;         // [total_q, num_heads_q, head_dim]; data null: only the LSE
  float* softmax_lse;  // [num_heads_q, lse_stride]
  int64_t lse_stride;  // total_q
  Heads heads;
  Visibility visibility;
  float softmax_scale;
  const Segment* segments;
  const Block* blocks;  // rows of a key head; every block is run for each key head
  int64_t num_blocks;
};

// The gradient runs in one of two ways. Whole: every block of `row_blocks` is a whole segment, one
// task per key head computes each probability tile once for dq, dk and dv (5 products a tile).
// Split: `row_blocks` gives dq and `key_blocks` gives dk and dv in independent tasks (7 products a
// tile), for batches with fewer segments and heads than threads. Both add in the same order.
struct BackwardParams {
  RowView dout, q, k, v, out;  // as in ForwardParams
  const float* softmax_lse;    // [num_heads_q, lse_stride]
  const float* dsoftmax_lse;   // [num_heads_q, lse_stride] or null
  int64_t lse_stride;          // total_q
  RowView dq, dk, dv;          // every row of every segment is written
  float* dq_accumulator;       // [total_q * num_heads_q, padded_head_dim] scratch
  float* delta;                // [total_q * num_heads_q] scratch: rowsum(dout * out) - dlse
  Heads heads;
  Visibility visibility;
  float softmax_scale;
  const Segment* segments;
  const Block* row_blocks;  // rows of a key head
  int64_t num_row_blocks;
  const Block* key_blocks;  // keys; none in the whole form
  int64_t num_key_blocks;
};

// What policy_attention adds: causal self-attention of packed segments in which key j counts
// policy[j] in the softmax, and 1 for the query of its own row. The maximum is taken over all keys
// that are seen, whatever they count, and
//   out = (sum of e v + epsilon / length * sum of the segment's v) / (sum of e + epsilon).
// Segments are the same for queries and keys; visibility is causal; softmax_lse is not used.
struct PolicyForwardParams {
  ForwardParams attention;
  const float* policy;  // [total]
  float epsilon;
  float* softmax_max;  // [num_heads_q, lse_stride] largest scaled score times log2(e)
  float* softmax_sum;  // [num_heads_q, lse_stride] sum of e, without epsilon
  float* value_sums;   // [num_segments, num_heads_k, padded_head_dim] scratch
  int64_t num_segments;
};

struct PolicyBackwardParams {
  BackwardParams attention;
  const float* policy;  // [total]
  float epsilon;
  const float* softmax_max;  // [num_heads_q, lse_stride] from the forward pass
  const float* softmax_sum;  // [num_heads_q, lse_stride] likewise
  float* dpolicy;            // [total]; every row of every segment is written
  float* dpolicy_of_heads;   // [num_heads_k, lse_stride] scratch
  float* dout_sums;          // [num_segments, num_heads_k, padded_head_dim] scratch
  int64_t num_segments;
};

struct DecodeParams {
  RowView q;               // [batch, num_heads_q, head_dim]
  RowView k, v;            // slots [batch, capacity, num_heads_k, head_dim]
  RowView out;             // [batch, num_heads_q, head_dim]
  float* softmax_lse;      // [num_heads_q, batch]
  float* scores;           // [batch, capacity] or null
  float* raw_scores;       // [batch, num_heads_q, capacity] scratch, null without scores
  float* partial_out;      // [num_splits, batch, num_heads_q, head_dim] scratch
  float* partial_max;      // [num_splits, batch, num_heads_q] scratch, base-2 logarithms
  float* partial_sum;      // [num_splits, batch, num_heads_q] scratch
  const int32_t* lengths;  // [batch] keys in use, within [0, capacity]
  int64_t batch;
  int64_t capacity;
  int64_t num_splits;
  Heads heads;
  float softmax_scale;
};

enum class Reduce : int32_t { kSum, kMean, kMax };

struct ScoreParams {
  RowView q;                 // [total_q, num_heads_q, head_dim]
  RowView k;                 // [total_k, num_heads_k, head_dim]
  const float* softmax_lse;  // [num_heads_q, lse_stride]; unused by direct_scores
  int64_t lse_stride;
  float* scores;      // [total_k]
  float* raw_scores;  // direct_scores: [num_heads_q * kDirectQueries, total_k] scratch
  float* row_lse;     // direct_scores: [num_heads_q, total_q] scratch, base-2 logarithms
  int64_t total_k;
  int64_t total_q;
  Heads heads;
  Visibility visibility;
  float softmax_scale;
  Reduce head_reduce;
  Reduce query_reduce;
  const Segment* segments;
  int64_t num_segments;
  const Block* blocks;  // keys
  int64_t num_blocks;
};

// Longest number of query rows a segment may have for direct_scores.
constexpr int64_t kDirectQueries = 4;

// The kernels of one instruction set. Every kernel runs on up to parallel.num_threads threads,
// thread t using bytes [t * workspace_bytes, (t + 1) * workspace_bytes) of `workspace`, which is
// 64-aligned.
struct AttentionKernels {
  int64_t forward_rows;   // most rows in a forward block
  int64_t backward_rows;  // rows of a backward tile: blocks are best a multiple of it
  int64_t backward_keys;  // keys of a backward tile, likewise
  int64_t score_keys;     // keys of a score tile, likewise

  int64_t (*workspace_bytes)(const Heads& heads);
  void (*forward)(const ForwardParams& params, const ParallelFor& parallel, char* workspace);
  void (*backward)(const BackwardParams& params, const ParallelFor& parallel, char* workspace);
  void (*policy_forward)(const PolicyForwardParams& params, const ParallelFor& parallel,
                         char* workspace);
  void (*policy_backward)(const PolicyBackwardParams& params, const ParallelFor& parallel,
                          char* workspace);
  void (*decode)(const DecodeParams& params, const ParallelFor& parallel, char* workspace);
  void (*direct_scores)(const ScoreParams& params, const ParallelFor& parallel, char* workspace);
  void (*column_scores)(const ScoreParams& params, const ParallelFor& parallel, char* workspace);
};

const AttentionKernels& attention_kernels(Isa isa);

}  // namespace pruneops
