// Gradients of policy attention with mma.sync: the kernels of flash_backward_sm80.cuh, in which
// keys count what the policy says. With x = exp(score - max) / den, den = sum + epsilon, and G what
// a key counts for a row, 1 if it is the row's own:
//   P = G x     dS = P (dout V^T - delta)     dpolicy = sum of x (dout V^T - delta), but a row's
//   own dv = P^T dout + epsilon / length * sum of dout / den     dk and dq as without a policy
// G is multiplied with before P and dS are rounded: x of a dropped key knows no bounds. It is not
// multiplied with where x is 0 because the row does not see the key: policies of NaN that no row
// sees stay out of the results.

#pragma once

#include "attention/cuda/flash_backward_sm80.cuh"
#include "attention/cuda/flash_policy.h"

namespace pruneops {

struct PolicyKeys {
  static constexpr int kLastApart = 1;  // the row's own

  const float* policy;       // [total]
  const float* softmax_max;  // [num_heads_q, total]
  const float* softmax_sum;  // [num_heads_q, total]
  float epsilon;
  const float* dout_sums;   // [num_segments, num_heads_k, head_dim] of dout / den
  const int32_t* bounds;    // [num_segments + 1]
  float* dpolicy_of_heads;  // [num_heads_k, total]

  // The logarithm is that of |den|; its last bit is set if den is negative, as some policies make
  // it.
  __device__ __forceinline__ FlashRowTerms row_terms(const FlashBackwardParams&, int64_t at,
                                                     float sum) const {
    const float den = softmax_sum[at] + epsilon;
    const uint32_t bits = __float_as_uint(softmax_max[at] + log2f(fabsf(den)));
    return {__uint_as_float(den < 0.0f ? bits | 1u : bits & ~1u), sum};
  }
  static __device__ __forceinline__ float of_row(float p, float log2_lse) {
    return __uint_as_float(__float_as_uint(p) ^ __float_as_uint(log2_lse) << 31);
  }

  struct LaneKeys {
    float counts[2];
    float dpolicy[2] = {};  // over the lane's rows

    __device__ __forceinline__ LaneKeys(const PolicyKeys& of, const FlashTile& tile, int strip) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int key = strip + static_cast<int>(threadIdx.x) % kWarpSize / 4 + 8 * half;
        counts[half] =
            key < tile.size ? __ldg(of.policy + tile.segment.k_begin + tile.begin + key) : 0.0f;
      }
    }

    template <bool kHasLast, int kRows>
    __device__ __forceinline__ void weigh(const int32_t* limits, int first_key,
                                          float (&p)[kRows / 8][4],
                                          const float (&ds)[kRows / 8][4]) {
      const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
      const int key = first_key + lane / 4;
      float of_tile[2] = {};
#pragma unroll
      for (int n = 0; n < kRows / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (kHasLast && limits[8 * n + lane % 4 * 2 + i % 2] <= key + i / 2 * 8 + 1) continue;
          of_tile[i / 2] = fmaf(p[n][i], ds[n][i], of_tile[i / 2]);
          p[n][i] *= counts[i / 2];
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) dpolicy[half] += of_tile[half];
    }

    template <int kHeadDim>
    __device__ __forceinline__ void finish(const PolicyKeys& of, const FlashBackwardParams& p,
                                           const FlashTile& tile, int strip,
                                           float (&dv)[kHeadDim / 8][4]) const {
      const Segment& segment = tile.segment;
      if (segment.q_len == 0) return;  // keys of no segment
      const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = dpolicy[half];
        sum += __shfl_xor_sync(kAllLanes, sum, 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
        const int key = strip + lane / 4 + 8 * half;
        if (lane % 4 != 0 || key >= tile.size) continue;
        of.dpolicy_of_heads[tile.head_k * p.segments.total_k + segment.k_begin + tile.begin + key] =
            sum;
      }
      const int32_t b =
          warp_first_above(of.bounds + 1, static_cast<int32_t>(p.segments.num_segments),
                           static_cast<int32_t>(segment.q_begin));
      const float* sums = of.dout_sums + (b * p.heads.num_heads_k + tile.head_k) * kHeadDim;
      const float share = of.epsilon / static_cast<float>(segment.q_len);
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        const float2 all = __ldg(reinterpret_cast<const float2*>(sums + 8 * n + lane % 4 * 2));
#pragma unroll
        for (int i = 0; i < 4; ++i) dv[n][i] = fmaf(i % 2 == 0 ? all.x : all.y, share, dv[n][i]);
      }
    }
  };

  template <int kKeys>
  struct alignas(8) TileKeys {
    float counts[kKeys];

    __device__ __forceinline__ void put(int key, float count) { counts[key] = count; }

    template <bool kHasLast>
    __device__ __forceinline__ void weigh(const int32_t (&limits)[2], int first_key,
                                          float (&p)[kKeys / 8][4]) const {
      const int column = static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        const float2 pair = *reinterpret_cast<const float2*>(&counts[8 * n + column]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (kHasLast && limits[i / 2] <= first_key + 8 * n + column + i % 2 + 1) continue;
          p[n][i] *= i % 2 == 0 ? pair.x : pair.y;
        }
      }
    }
  };
  __device__ __forceinline__ float count_of(int64_t key) const { return __ldg(policy + key); }
};

template <int kHeadDim>
cudaError_t launch_flash_policy_backward_sm80(const FlashPolicyBackwardParams& params,
                                              cudaStream_t stream) {
  const CudaPolicyBackwardParams& b = params.policy;
  const CudaPolicyParams& f = b.forward;
  FlashBackwardParams p{};
  p.dout = b.dout;
  p.q = f.q;
  p.k = f.k;
  p.v = f.v;
  p.out = f.out;
  p.dq = b.dq;
  p.dk = b.dk;
  p.dv = b.dv;
  p.heads = f.heads;
  p.segments = params.segments;
  p.visibility = {true, nullptr};
  p.softmax_scale = f.softmax_scale;
  p.row_terms = reinterpret_cast<FlashRowTerms*>(b.delta);
  const PolicyKeys keys = {f.policy, f.softmax_max, f.softmax_sum,     f.epsilon,
                           f.sums,   f.bounds,      b.dpolicy_of_heads};
  const bool bfloat16 = p.q.type == FloatType::kBFloat16;
  const cudaError_t error = bfloat16 ? launch_flash_row_terms<BFloat16, kHeadDim>(p, stream, keys)
                                     : launch_flash_row_terms<Half, kHeadDim>(p, stream, keys);
  if (error != cudaSuccess) return error;
  const auto launch = bfloat16
                          ? launch_flash_gradients_sm80<kHeadDim, MmaType::kBFloat16, PolicyKeys>
                          : launch_flash_gradients_sm80<kHeadDim, MmaType::kFloat16, PolicyKeys>;
  return launch(p, params.keys, params.rows, keys, stream);
}

}  // namespace pruneops
