// Attention backward. With P = exp(S - LSE), delta = rowsum(dO * O) - dLSE and dS = P * (dO V^T -
// delta): dV = P^T dO, dK = scale dS^T Q, dQ = scale dS K. P is recomputed tile by tile and never
// stored. How P and dS come from a tile's products is a template parameter: PlainGradient here,
// another in policy.h.

#pragma once

#include "attention/attention.h"
#include "attention/cpu/microkernel.h"
#include "attention/cpu/pack.h"
#include "attention/cpu/softmax.h"
#include "attention/cpu/tasks.h"

namespace pruneops {
namespace PRUNEOPS_ISA_NAMESPACE {
namespace {

constexpr int64_t kGradRows = 96;   // query rows in a tile
constexpr int64_t kGradKeys = 128;  // keys in a tile
constexpr int64_t kGradRowGroups = (kGradRows + kMicroRows - 1) / kMicroRows;
constexpr int64_t kGradKeyGroups = (kGradKeys + kMicroRows - 1) / kMicroRows;

struct BackwardWorkspace {
  float* q;         // [kGradRows, padded]
  float* q_panels;  // panels: [kGradRows, padded]
  float* dout;      // [kGradRows, padded]
  float* dout_panels;
  float* k_t;  // panels, transposed: [padded, kGradKeys]
  float* v_t;
  float* k_panels;  // panels: [kGradKeys, padded]
  float* p;         // [kGradRows, kGradKeys]
  float* ds;        // [kGradRows, kGradKeys]
  float* dk;        // [kGradKeys, padded]
  float* dv;
  float* lse;      // [kGradRows] base-2 logarithms
  float* staging;  // [kVecWidth, padded]
  int32_t* limit;  // [kGradRows]
  int64_t padded;  // head_dim in whole vectors

  BackwardWorkspace(Arena& arena, int64_t head_dim) : padded(round_up(head_dim, kVecWidth)) {
    q = arena.take<float>(kGradRows * padded);
    q_panels = arena.take<float>(kGradRows * padded);
    dout = arena.take<float>(kGradRows * padded);
    dout_panels = arena.take<float>(kGradRows * padded);
    k_t = arena.take<float>(kGradKeys * padded);
    v_t = arena.take<float>(kGradKeys * padded);
    k_panels = arena.take<float>(kGradKeys * padded);
    p = arena.take<float>(kGradRows * kGradKeys);
    ds = arena.take<float>(kGradRows * kGradKeys);
    dk = arena.take<float>(kGradKeys * padded);
    dv = arena.take<float>(kGradKeys * padded);
    lse = arena.take<float>(kGradRows);
    staging = arena.take<float>(kVecWidth * padded);
    limit = arena.take<int32_t>(kGradRows);
  }
};

// Scratch of one (segment, key head): row r of the key head is row first + r.
PRUNEOPS_INLINE int64_t scratch_row(const BackwardParams& params, const Segment& segment,
                                    int64_t head_k) {
  return (head_k * params.lse_stride + segment.q_begin) * params.heads.group;
}

inline void compute_delta(const BackwardParams& params, const Block& block, int64_t head_k,
                          const BackwardWorkspace& ws) {
  const Segment& segment = params.segments[block.segment];
  const Heads& heads = params.heads;
  const Rows dout = query_rows(params.dout, segment, heads, head_k);
  const Rows out = query_rows(params.out, segment, heads, head_k);
  float* delta = params.delta + scratch_row(params, segment, head_k);
  for (int64_t r = block.begin; r < block.end; ++r) {
    load_row(ws.dout, dout.at(r), dout.type, 0, heads.head_dim, ws.padded);
    load_row(ws.q, out.at(r), out.type, 0, heads.head_dim, ws.padded);
    Vec sum = zero();
    for (int64_t d = 0; d < ws.padded; d += kVecWidth) {
      sum = fma(load(ws.dout + d), load(ws.q + d), sum);
    }
    delta[r] = reduce_sum(sum);
    if (params.dsoftmax_lse != nullptr) {
      const int64_t head = head_k * heads.group + r % heads.group;
      delta[r] -= params.dsoftmax_lse[head * params.lse_stride + segment.q_begin + r / heads.group];
    }
  }
}

PRUNEOPS_INLINE void pack_keys(const BackwardParams& params, const Segment& segment, int64_t head_k,
                               int64_t first, int64_t keys, const BackwardWorkspace& ws) {
  const int64_t head_dim = params.heads.head_dim;
  const Rows k = key_rows(params.k, segment, head_k);
  const Rows v = key_rows(params.v, segment, head_k);
  Pack<FloatOps<float>>::transposed(ws.k_t, k, first, keys, head_dim, ws.staging);
  Pack<FloatOps<float>>::transposed(ws.v_t, v, first, keys, head_dim, ws.staging);
  Pack<FloatOps<float>>::panels(ws.k_panels, k, first, keys, head_dim);
}

// The gradient of varlen_attention's softmax, by one thread.
class PlainGradient {
 public:
  // Before rows [first, first + rows) of the key head are used.
  PRUNEOPS_INLINE void load_rows(const BackwardParams& params, const Segment& segment,
                                 int64_t head_k, int64_t first, int64_t rows,
                                 const BackwardWorkspace& ws) {
    const Heads& heads = params.heads;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t head = head_k * heads.group + (first + r) % heads.group;
      const int64_t query = segment.q_begin + (first + r) / heads.group;
      ws.lse[r] = params.softmax_lse[head * params.lse_stride + query] * kLog2E;
    }
  }

  // Before keys of a segment are used, and around what is added up for them: ws.dk and ws.dv, zero
  // at first.
  PRUNEOPS_INLINE void load_keys(const Segment&, int64_t /*first_key*/, int64_t /*keys*/) {}
  PRUNEOPS_INLINE void begin_keys(const BackwardParams&, const Segment&, int64_t /*head_k*/,
                                  int64_t /*keys*/, const BackwardWorkspace&) {}
  PRUNEOPS_INLINE void end_keys(const BackwardParams&, const Segment&, int64_t /*head_k*/,
                                int64_t /*first_key*/, int64_t /*keys*/) {}

  // From ws.p = sign * Q K^T and ws.ds = dO V^T to ws.p = P and ws.ds = softmax_scale * dS, 0 where
  // masked.
  PRUNEOPS_INLINE void finish_tile(const BackwardParams& params, const Scale& score_scale,
                                   const float* delta, int64_t rows, int64_t first_key,
                                   int64_t keys, const BackwardWorkspace& ws) {
    const int64_t padded_keys = round_up(keys, kVecWidth);
    const Vec scale = broadcast(params.softmax_scale);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t count = min_of<int64_t>(ws.limit[r] - first_key, keys);
      float* p = ws.p + r * kGradKeys;
      float* ds = ws.ds + r * kGradKeys;
      probabilities(p, count, padded_keys, score_scale, ws.lse[r]);
      const int64_t end = count > 0 ? pad_row(ds, count, 0.0f) : 0;
      const Vec d = broadcast(delta[r]);
      for (int64_t j = 0; j < end; j += kVecWidth) {
        store(ds + j, load(p + j) * (load(ds + j) - d) * scale);
      }
      for (int64_t j = end; j < padded_keys; j += kVecWidth) store(ds + j, zero());
    }
  }
};

// Limits, softmax state and operands of rows [first, first + rows); returns the largest limit.
template <class Gradient>
int64_t pack_queries(const BackwardParams& params, const Segment& segment, int64_t head_k,
                     int64_t first, int64_t rows, int64_t first_key, bool panels,
                     Gradient& gradient, const BackwardWorkspace& ws) {
  const Heads& heads = params.heads;
  const int64_t largest =
      row_limits(params.visibility, segment, heads.group, first, rows, ws.limit);
  if (largest <= first_key) return largest;
  gradient.load_rows(params, segment, head_k, first, rows, ws);
  const Rows q = query_rows(params.q, segment, heads, head_k);
  const Rows dout = query_rows(params.dout, segment, heads, head_k);
  Pack<FloatOps<float>>::rows(ws.q, ws.padded, q, first, rows, heads.head_dim);
  Pack<FloatOps<float>>::rows(ws.dout, ws.padded, dout, first, rows, heads.head_dim);
  if (panels) {
    Pack<FloatOps<float>>::panels(ws.q_panels, q, first, rows, heads.head_dim);
    Pack<FloatOps<float>>::panels(ws.dout_panels, dout, first, rows, heads.head_dim);
  }
  return largest;
}

// ws.p = P and ws.ds = softmax_scale * dS for the packed rows and keys, 0 where masked.
//   visible  [row groups] keys of the tile that the group sees
template <class Gradient>
void probability_tile(const BackwardParams& params, const float* delta, int64_t rows,
                      int64_t first_key, int64_t keys, const int32_t* visible, Gradient& gradient,
                      const BackwardWorkspace& ws) {
  const Scale score_scale(params.softmax_scale);
  Product<FloatOps<float>> product;
  product.lda = ws.padded;
  product.b_depth = product.depth = params.heads.head_dim;
  product.ldc = kGradKeys;
  product.rows = rows;
  product.cols = keys;
  product.col_limit = visible;

  product.a = ws.q;
  product.b = ws.k_t;
  product.c = ws.p;
  product.scale = score_scale.sign;
  multiply<FloatOps<float>, Update::kScale, false>(product);

  product.a = ws.dout;
  product.b = ws.v_t;
  product.c = ws.ds;
  product.scale = 1.0f;
  multiply<FloatOps<float>, Update::kScale, false>(product);

  gradient.finish_tile(params, score_scale, delta, rows, first_key, keys, ws);
}

// dq [rows, padded] += ds K
inline void add_query_gradient(const BackwardParams& params, int64_t rows, int64_t keys,
                               const int32_t* visible, float* dq, const BackwardWorkspace& ws) {
  Product<FloatOps<float>> product;
  product.a = ws.ds;
  product.lda = kGradKeys;
  product.b = ws.k_panels;
  product.b_depth = product.depth = keys;
  product.c = dq;
  product.ldc = ws.padded;
  product.rows = rows;
  product.cols = params.heads.head_dim;
  product.depth_end = visible;
  multiply<FloatOps<float>, Update::kAdd, false>(product);
}

// ws.dk += dS^T Q and ws.dv += P^T dO
inline void add_key_gradients(const BackwardParams& params, int64_t rows, int64_t first_key,
                              int64_t keys, const BackwardWorkspace& ws) {
  // Rows before the first one that sees a key of the group contribute nothing to it.
  int32_t depth_begin[kGradKeyGroups];
  for (int64_t j = 0, g = 0; j < keys; j += kMicroRows, ++g) {
    int64_t r = 0;
    while (r < rows && ws.limit[r] <= first_key + j) ++r;
    depth_begin[g] = static_cast<int32_t>(r);
  }
  Product<FloatOps<float>> product;
  product.lda = kGradKeys;
  product.b_depth = product.depth = rows;
  product.ldc = ws.padded;
  product.rows = keys;
  product.cols = params.heads.head_dim;
  product.depth_begin = depth_begin;

  product.a = ws.p;
  product.b = ws.dout_panels;
  product.c = ws.dv;
  multiply<FloatOps<float>, Update::kAdd, true>(product);

  product.a = ws.ds;
  product.b = ws.q_panels;
  product.c = ws.dk;
  multiply<FloatOps<float>, Update::kAdd, true>(product);
}

// dk and dv of keys [first_key, first_key + keys), and, where dq is given, those keys' part of dq.
//   dq  [rows of the key head, padded] fp32 or null
template <class Gradient>
void key_block_gradients(const BackwardParams& params, const Segment& segment, int64_t head_k,
                         int64_t first_key, int64_t keys, float* dq, Gradient& gradient,
                         const BackwardWorkspace& ws) {
  const Heads& heads = params.heads;
  const int64_t total_rows = segment.q_len * heads.group;
  const float* delta = params.delta + scratch_row(params, segment, head_k);
  pack_keys(params, segment, head_k, first_key, keys, ws);
  for (int64_t i = 0; i < keys * ws.padded; i += kVecWidth) {
    store(ws.dk + i, zero());
    store(ws.dv + i, zero());
  }
  gradient.load_keys(segment, first_key, keys);
  gradient.begin_keys(params, segment, head_k, keys, ws);
  for (int64_t first = 0; first < total_rows; first += kGradRows) {
    const int64_t rows = min_of(kGradRows, total_rows - first);
    if (pack_queries(params, segment, head_k, first, rows, first_key, true, gradient, ws) <=
        first_key) {
      continue;
    }
    int32_t visible[kGradRowGroups];
    group_columns(ws.limit, rows, kMicroRows, first_key, keys, visible);
    probability_tile(params, delta + first, rows, first_key, keys, visible, gradient, ws);
    add_key_gradients(params, rows, first_key, keys, ws);
    if (dq != nullptr) {
      add_query_gradient(params, rows, keys, visible, dq + first * ws.padded, ws);
    }
  }
  gradient.end_keys(params, segment, head_k, first_key, keys);
  const Rows dk = key_rows(params.dk, segment, head_k);
  const Rows dv = key_rows(params.dv, segment, head_k);
  for (int64_t j = 0; j < keys; ++j) {
    store_row(dk.at(first_key + j), dk.type, ws.dk + j * ws.padded, heads.head_dim, 1.0f);
    store_row(dv.at(first_key + j), dv.type, ws.dv + j * ws.padded, heads.head_dim, 1.0f);
  }
}

PRUNEOPS_INLINE void store_query_gradient(const BackwardParams& params, const Segment& segment,
                                          int64_t head_k, int64_t first, int64_t rows,
                                          const float* dq, int64_t padded) {
  const Rows out = query_rows(params.dq, segment, params.heads, head_k);
  for (int64_t r = 0; r < rows; ++r) {
    store_row(out.at(first + r), out.type, dq + r * padded, params.heads.head_dim, 1.0f);
  }
}

// dq of the block's rows, all keys; dq_rows: [rows, padded] fp32 scratch.
template <class Gradient>
void row_block_gradient(const BackwardParams& params, const Block& block, int64_t head_k,
                        float* dq_rows, Gradient& gradient, const BackwardWorkspace& ws) {
  const Segment& segment = params.segments[block.segment];
  const float* delta = params.delta + scratch_row(params, segment, head_k);
  for (int64_t first = block.begin; first < block.end; first += kGradRows) {
    const int64_t rows = min_of(kGradRows, block.end - first);
    float* dq = dq_rows + (first - block.begin) * ws.padded;
    for (int64_t i = 0; i < rows * ws.padded; i += kVecWidth) store(dq + i, zero());
    const int64_t largest =
        pack_queries(params, segment, head_k, first, rows, 0, false, gradient, ws);
    for (int64_t key = 0; key < largest; key += kGradKeys) {
      const int64_t keys = min_of(kGradKeys, segment.k_len - key);
      int32_t visible[kGradRowGroups];
      group_columns(ws.limit, rows, kMicroRows, key, keys, visible);
      pack_keys(params, segment, head_k, key, keys, ws);
      gradient.load_keys(segment, key, keys);
      probability_tile(params, delta + first, rows, key, keys, visible, gradient, ws);
      add_query_gradient(params, rows, keys, visible, dq, ws);
    }
    store_query_gradient(params, segment, head_k, first, rows, dq, ws.padded);
  }
}

// All gradients of one whole segment and key head.
template <class Gradient>
void segment_gradients(const BackwardParams& params, const Segment& segment, int64_t head_k,
                       float* dq, Gradient& gradient, const BackwardWorkspace& ws) {
  const int64_t rows = segment.q_len * params.heads.group;
  for (int64_t i = 0; i < rows * ws.padded; i += kVecWidth) store(dq + i, zero());
  for (int64_t key = 0; key < segment.k_len; key += kGradKeys) {
    key_block_gradients(params, segment, head_k, key, min_of(kGradKeys, segment.k_len - key), dq,
                        gradient, ws);
  }
  store_query_gradient(params, segment, head_k, 0, rows, dq, ws.padded);
}

inline int64_t backward_workspace_bytes(int64_t head_dim) {
  Arena arena(nullptr);
  BackwardWorkspace ws(arena, head_dim);
  return arena.used();
}

// make_gradient()  what one thread needs of the kind of gradient
template <class MakeGradient>
void run_backward(const BackwardParams& params, const MakeGradient& make_gradient,
                  const ParallelFor& parallel, char* workspace) {
  const Heads& heads = params.heads;
  const int64_t bytes = backward_workspace_bytes(heads.head_dim);
  const int64_t heads_k = heads.num_heads_k;
  const int64_t row_tasks = params.num_row_blocks * heads_k;
  const int64_t key_tasks = params.num_key_blocks * heads_k;
  run_tasks(parallel, row_tasks, workspace, bytes, [&](int64_t task, char* base) {
    Arena arena(base);
    const BackwardWorkspace ws(arena, heads.head_dim);
    compute_delta(params, params.row_blocks[task / heads_k], task % heads_k, ws);
  });
  run_tasks(parallel, row_tasks + key_tasks, workspace, bytes, [&](int64_t task, char* base) {
    Arena arena(base);
    const BackwardWorkspace ws(arena, heads.head_dim);
    auto gradient = make_gradient();
    const int64_t head_k = task % heads_k;
    if (task < key_tasks) {
      const Block& block = params.key_blocks[task / heads_k];
      const Segment& segment = params.segments[block.segment];
      for (int64_t key = block.begin; key < block.end; key += kGradKeys) {
        key_block_gradients(params, segment, head_k, key, min_of(kGradKeys, block.end - key),
                            nullptr, gradient, ws);
      }
      return;
    }
    const Block& block = params.row_blocks[(task - key_tasks) / heads_k];
    const Segment& segment = params.segments[block.segment];
    float* dq =
        params.dq_accumulator + (scratch_row(params, segment, head_k) + block.begin) * ws.padded;
    if (key_tasks == 0) {
      segment_gradients(params, segment, head_k, dq, gradient, ws);
    } else {
      row_block_gradient(params, block, head_k, dq, gradient, ws);
    }
  });
}

inline void backward(const BackwardParams& params, const ParallelFor& parallel, char* workspace) {
  run_backward(params, [] { return PlainGradient(); }, parallel, workspace);
}

}  // namespace
}  // namespace PRUNEOPS_ISA_NAMESPACE
}  // namespace pruneops
