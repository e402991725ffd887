// The consumers of the sm_90a forward pass: scores, softmax and output of 64 rows a warpgroup.
//
// The scores of the next tile of keys are multiplied while the output of the last one still is, and
// the softmax of the next one begins before the output has come. On top of that the consumers take
// turns: each issues its products when the one before has, and so is at its softmax while the
// others multiply.

#pragma once

#include "attention/cuda/flash_forward_sm90_block.cuh"
#include "common/cuda_math.cuh"

namespace pruneops {

// The first or second of the thread's two rows, of the consumer's 64.
__device__ __forceinline__ int row_of_thread(int half) {
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  return thread / kWarpSize * 16 + thread % kWarpSize / 4 + 8 * half;
}

// What a thread keeps of its two rows: of those, lane 4 g + t has columns 8 j + 2 t and
// 8 j + 2 t + 1.
template <int kHeadDim>
struct ForwardRowsSm90 {
  static constexpr int kKeys = ForwardSm90<kHeadDim>::kTile.keys;
  static constexpr int kSteps = kKeys / 16;  // of a product with values

  float scores[kKeys / 2];
  uint32_t weights[kSteps][4];  // rounded exponents of the tile before, as left operands
  float out[kHeadDim / 2];
  float largest[2];  // product so far, of each row
  float sum[2];      // of exponents, over this thread's columns
  float factor[2];   // that what was summed before is to be brought down by

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (float& x : out) x = 0.0f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      largest[half] = -INFINITY;
      sum[half] = 0.0f;
    }
  }

  // -inf for keys that a row does not see.
  //   limits  of the two rows
  __device__ __forceinline__ void mask(const int32_t (&limits)[2], int32_t first_key) {
    const int32_t column = first_key + static_cast<int32_t>(threadIdx.x) % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t seen = limits[half] - column;
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (8 * i + e >= seen) scores[4 * i + 2 * half + e] = -INFINITY;
        }
      }
    }
  }

  // Scores become exponents against the largest product so far.
  __device__ __forceinline__ void softmax(float log2_scale) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = largest[half];
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
        most = fmaxf(most, fmaxf(scores[4 * i + 2 * half], scores[4 * i + 2 * half + 1]));
      }
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
      const float shift = shift_of(most) * log2_scale;
      factor[half] = fast_exp2(fmaf(largest[half], log2_scale, -shift));
      largest[half] = most;
      float added = 0.0f;
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
        for (int e = 4 * i + 2 * half; e < 4 * i + 2 * half + 2; ++e) {
          scores[e] = fast_exp2(fmaf(scores[e], log2_scale, -shift));
          added += scores[e];
        }
      }
      sum[half] = fmaf(sum[half], factor[half], added);
    }
  }

  template <MmaType kType>
  __device__ __forceinline__ void round_weights() {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weights[step][i] = pack_pair<kType>(scores[8 * step + 2 * i], scores[8 * step + 2 * i + 1]);
      }
      pin_registers(weights[step]);
    }
  }

  __device__ __forceinline__ void bring_down_out() {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) out[i] *= factor[i / 2 % 2];
  }
};

// Begins scores = queries x keys.
template <MmaType kType, int kHeadDim>
__device__ __forceinline__ void begin_scores(const unsigned char* queries,
                                             const unsigned char* keys,
                                             ForwardRowsSm90<kHeadDim>& rows) {
  using Config = ForwardSm90<kHeadDim>;
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    multiply<kType, Config::kTile.keys, Operand::kRows>(
        rows.scores, rows_operand<typename Config::QueryTile>(queries, 0, step),
        rows_operand<typename Config::KeyTile>(keys, 0, step), step > 0);
  }
  commit_products();
}

// Begins out += weights x values.
template <MmaType kType, int kHeadDim>
__device__ __forceinline__ void begin_out(const unsigned char* values,
                                          ForwardRowsSm90<kHeadDim>& rows) {
  using Config = ForwardSm90<kHeadDim>;
#pragma unroll
  for (int step = 0; step < ForwardRowsSm90<kHeadDim>::kSteps; ++step) {
    multiply<kType, kHeadDim, Operand::kColumns>(
        rows.out, rows.weights[step], columns_operand<typename Config::KeyTile>(values, step),
        true);
  }
  commit_products();
}

// Turns of the consumers: each waits for its own, which the one before begins.
__device__ __forceinline__ void wait_for_turn(int consumer) {
  sync_named_barrier(1 + consumer, 2 * kWarpgroup);
}
__device__ __forceinline__ void begin_turn(int consumer) {
  arrive_at_named_barrier(1 + consumer, 2 * kWarpgroup);
}

// Writes 64 rows' output and LSE. Two neighbouring lanes exchange halves of 16 columns first, so
// that a lane has 4 columns in a row and 4 lanes 32 bytes.
//   first_row  of the consumer in the tile
template <MmaType kType, int kHeadDim>
__device__ __forceinline__ void write_rows(const FlashForwardParams& p, const ForwardWorkSm90& work,
                                           int first_row, ForwardRowsSm90<kHeadDim>& rows) {
  const int t = static_cast<int>(threadIdx.x) % 4;
  const PackedSource out =
      packed_source(p.out, work.tile.segment.q_begin, work.tile.head_k, work.rows);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = rows.sum[half];
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    const int r = first_row + row_of_thread(half);
    const bool exists = r < work.tile.size;
    if (exists && t == 0) {
      int query, head;
      work.rows.locate(r, query, head);
      const int64_t row = work.tile.segment.q_begin + work.rows.first_query + query;
      p.softmax_lse[(work.tile.head_k * p.heads.group + head) * p.segments.total_q + row] =
          natural_lse(rows.largest[half] * log2_scale_of(p.softmax_scale), sum);
    }
    uint16_t* to = out.data + out.offset(r) + t % 2 * 8 + t / 2 * 4;
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      const float* left = rows.out + 8 * i + 2 * half;
      const float* right = left + 4;
      const uint32_t own_left = pack_pair<kType>(left[0] * inverse, left[1] * inverse);
      const uint32_t own_right = pack_pair<kType>(right[0] * inverse, right[1] * inverse);
      const uint32_t other = __shfl_xor_sync(kAllLanes, t % 2 == 0 ? own_right : own_left, 1);
      const uint2 words = t % 2 == 0 ? uint2{own_left, other} : uint2{other, own_right};
      if (exists) *reinterpret_cast<uint2*>(to + 16 * i) = words;
    }
  }
}

// Where a consumer is in the rings that all of them share.
template <int kHeadDim>
struct KeyPositionsSm90 {
  RingPosition<ForwardSm90<kHeadDim>::kTile.stages> keys, values;
};

// A consumer without rows only gives back what is shared.
template <int kHeadDim>
__device__ __forceinline__ void pass_over_keys(const ForwardSharedSm90<kHeadDim>& shared,
                                               int32_t num_tiles, KeyPositionsSm90<kHeadDim>& at) {
  auto& small = shared.small();
  for (int32_t i = 0; i < num_tiles; ++i) {
    wait_for_phase(&small.keys_full[at.keys.stage], at.keys.parity);
    arrive_as_warp(&small.keys_empty[at.keys.stage]);
    at.keys.advance();
    wait_for_phase(&small.values_full[at.values.stage], at.values.parity);
    arrive_as_warp(&small.values_empty[at.values.stage]);
    at.values.advance();
  }
}

// Output and sums of a consumer's rows over all tiles of keys, of which there is at least one. Its
// queries are there.
template <MmaType kType, int kHeadDim>
__device__ __forceinline__ void go_over_keys(const FlashForwardParams& p,
                                             const ForwardSharedSm90<kHeadDim>& shared,
                                             const ForwardWorkSm90& work, int consumer,
                                             const int32_t (&limits)[2],
                                             KeyPositionsSm90<kHeadDim>& at,
                                             ForwardRowsSm90<kHeadDim>& rows) {
  using Config = ForwardSm90<kHeadDim>;
  auto& small = shared.small();
  const unsigned char* queries = shared.queries(consumer);
  const float log2_scale = log2_scale_of(p.softmax_scale);
  const int32_t unmasked = work.keys.unmasked;
  // Turns are taken if all consumers have rows.
  const bool in_turns = work.tile.size > (Config::kConsumers - 1) * Config::kConsumerRows;
  int32_t i = work.keys.all - 1;
  wait_for_phase(&small.keys_full[at.keys.stage], at.keys.parity);
  fence_products(rows.scores);
  begin_scores<kType>(queries, shared.keys(at.keys.stage), rows);
  wait_for_products<0>(rows.scores);
  arrive_as_warp(&small.keys_empty[at.keys.stage]);
  at.keys.advance();
  if (i >= unmasked) rows.mask(limits, i * Config::kTile.keys);
  rows.softmax(log2_scale);
  rows.template round_weights<kType>();
  while (i-- > 0) {
    wait_for_phase(&small.keys_full[at.keys.stage], at.keys.parity);
    if (in_turns) wait_for_turn(consumer);
    fence_products(rows.scores);
    begin_scores<kType>(queries, shared.keys(at.keys.stage), rows);
    wait_for_phase(&small.values_full[at.values.stage], at.values.parity);
    fence_products(rows.out);
    begin_out<kType>(shared.values(at.values.stage), rows);
    if (in_turns) begin_turn((consumer + 1) % Config::kConsumers);
    wait_for_products<1>(rows.scores);
    arrive_as_warp(&small.keys_empty[at.keys.stage]);
    at.keys.advance();
    if (i >= unmasked) rows.mask(limits, i * Config::kTile.keys);
    rows.softmax(log2_scale);
    wait_for_products<0>(rows.out);
    arrive_as_warp(&small.values_empty[at.values.stage]);
    at.values.advance();
    rows.template round_weights<kType>();
    rows.bring_down_out();
  }
  arrive_as_warp(&small.queries_empty[consumer]);
  wait_for_phase(&small.values_full[at.values.stage], at.values.parity);
  fence_products(rows.out);
  begin_out<kType>(shared.values(at.values.stage), rows);
  wait_for_products<0>(rows.out);
  arrive_as_warp(&small.values_empty[at.values.stage]);
  at.values.advance();
}

// All items, as consumer number `consumer`.
template <MmaType kType, int kHeadDim>
__device__ __forceinline__ void consume(const FlashForwardParams& p,
                                        const ForwardSharedSm90<kHeadDim>& shared, int consumer) {
  using Config = ForwardSm90<kHeadDim>;
  auto& small = shared.small();
  const int first_row = consumer * Config::kConsumerRows;
  RingPosition<Config::kWorkStages> at_work;
  RingPosition<1> at_queries;
  KeyPositionsSm90<kHeadDim> at_keys;
  if (consumer == Config::kConsumers - 1) begin_turn(0);
  for (;; at_work.advance()) {
    wait_for_phase(&small.work_full[at_work.stage], at_work.parity);
    const ForwardWorkSm90& work = small.work[at_work.stage];
    if (work.tile.size == 0) break;
    ForwardRowsSm90<kHeadDim> rows;
    rows.clear();
    if (first_row >= work.tile.size) {
      pass_over_keys(shared, work.keys.all, at_keys);
    } else if (work.keys.all > 0) {
      int32_t limits[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        limits[half] = limit_of_row(p.visibility, work.tile.segment, work.rows,
                                    first_row + row_of_thread(half), work.tile.size);
      }
      wait_for_phase(&small.queries_full[consumer], at_queries.parity);
      at_queries.advance();
      go_over_keys<kType>(p, shared, work, consumer, limits, at_keys, rows);
    }
    write_rows<kType>(p, work, first_row, rows);
    arrive_as_warp(&small.work_empty[at_work.stage]);
  }
  if (consumer == 0) wait_for_turn(0);  // which the last one began in vain
}

}  // namespace pruneops
