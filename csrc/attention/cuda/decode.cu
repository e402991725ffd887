// Launches of the decode kernels.

#include "attention/cuda/decode_combine.cuh"
#include "attention/cuda/decode_plain.cuh"
#include "attention/cuda/decode_tensor.cuh"

namespace pruneops {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t at_least(int64_t a, int64_t b) { return a < b ? b : a; }
int64_t in_16_bytes(int64_t floats) { return ceil_div(floats, 4) * 4; }

// Two waves of three blocks on each of 132 multiprocessors: rows of unequal length even out.
constexpr int64_t kEnoughBlocks = 2 * 3 * 132;
// A split of fewer keys is not worth its start and its partial result.
constexpr int64_t kFewestKeys = 128;
// A split of more keys may be all that is left to do at the end, for a long time.
constexpr int64_t kMostKeys = 1024;
constexpr int64_t kMaxSplits = 256;
constexpr int64_t kMostGridRows = 65535;  // y of a grid; further rows follow in a loop

dim3 split_grid(const CudaDecodeParams& p, const DecodePlan& plan) {
  return dim3(static_cast<unsigned>(p.batch * decode_head_tiles(p.heads)),
              static_cast<unsigned>(plan.num_splits));
}

// Whether q, k and v may be read 16 bytes at a time.
bool reads_16_bytes(const CudaDecodeParams& p) {
  return p.heads.head_dim * element_size(p.q.type) % 16 == 0 && begins_on_16_bytes(p.q) &&
         begins_on_16_bytes(p.k) && begins_on_16_bytes(p.v);
}

template <int kLanes>
cudaError_t launch_plain(const CudaDecodeParams& p, const DecodePlan& plan,
                         const DecodeScratch& scratch, cudaStream_t stream) {
  return launch_kernel(decode_plain_kernel<kLanes>, split_grid(p, plan), dim3(kDecodeThreads), 0,
                       stream, p, scratch, reads_16_bytes(p));
}

template <MmaType kType, int kDim, bool kWide>
cudaError_t launch_tensor(const CudaDecodeParams& p, const DecodePlan& plan,
                          const DecodeScratch& scratch, cudaStream_t stream) {
  return launch_kernel(decode_tensor_kernel<kType, kDim, kWide>, split_grid(p, plan),
                       dim3(kDecodeThreads), sizeof(DecodeShared<kDim>), stream, p, scratch);
}

// The smallest instance that holds a head. Rows that must be read element by element are rare and
// share one.
template <MmaType kType>
cudaError_t launch_16_bit(const CudaDecodeParams& p, const DecodePlan& plan,
                          const DecodeScratch& scratch, cudaStream_t stream) {
  const int64_t dim = p.heads.head_dim;
  if (!reads_16_bytes(p)) return launch_tensor<kType, kMaxHeadDim, false>(p, plan, scratch, stream);
  if (dim <= 64) return launch_tensor<kType, 64, true>(p, plan, scratch, stream);
  if (dim <= 80) return launch_tensor<kType, 80, true>(p, plan, scratch, stream);
  if (dim <= 96) return launch_tensor<kType, 96, true>(p, plan, scratch, stream);
  if (dim <= 128) return launch_tensor<kType, 128, true>(p, plan, scratch, stream);
  return launch_tensor<kType, kMaxHeadDim, true>(p, plan, scratch, stream);
}

cudaError_t launch_splits(const CudaDecodeParams& p, const DecodePlan& plan,
                          const DecodeScratch& scratch, cudaStream_t stream) {
  switch (p.q.type) {
    case FloatType::kBFloat16:
      return launch_16_bit<MmaType::kBFloat16>(p, plan, scratch, stream);
    case FloatType::kFloat16:
      return launch_16_bit<MmaType::kFloat16>(p, plan, scratch, stream);
    default:
      if (p.heads.head_dim <= 64) return launch_plain<8>(p, plan, scratch, stream);
      if (p.heads.head_dim <= 128) return launch_plain<16>(p, plan, scratch, stream);
      return launch_plain<32>(p, plan, scratch, stream);
  }
}

}  // namespace

DecodePlan plan_decode(const CudaDecodeParams& p, int64_t num_splits) {
  int64_t most = ceil_div(p.capacity, kDecodeSplitKeys);
  if (num_splits == 0) {
    num_splits =
        at_least(ceil_div(kEnoughBlocks, at_least(p.batch * decode_head_tiles(p.heads), 1)),
                 ceil_div(p.capacity, kMostKeys));
    most = ceil_div(p.capacity, kFewestKeys);
  }
  num_splits = at_least(at_most(num_splits, at_most(most, kMaxSplits)), 1);
  const int64_t rows = p.batch * p.heads.num_heads_q;
  DecodePlan plan{};
  plan.num_splits = static_cast<int32_t>(num_splits);
  plan.partial_out_floats = num_splits > 1 ? rows * num_splits * in_16_bytes(p.heads.head_dim) : 0;
  plan.logits_floats = p.scores != nullptr ? rows * in_16_bytes(p.capacity) : 0;
  plan.partial_lse_floats = rows * num_splits * 2;
  plan.workspace_floats = plan.partial_out_floats + plan.logits_floats + plan.partial_lse_floats;
  return plan;
}

cudaError_t launch_decode(const CudaDecodeParams& p, const DecodePlan& plan, cudaStream_t stream) {
  constexpr int64_t kMostBlocks = 0x7fffffff;  // x of a grid
  if (p.batch * decode_head_tiles(p.heads) > kMostBlocks) return cudaErrorInvalidValue;
  DecodeScratch scratch{};
  scratch.num_splits = plan.num_splits;
  scratch.out_stride = in_16_bytes(p.heads.head_dim);
  scratch.logit_stride = in_16_bytes(p.capacity);
  scratch.out = p.workspace;
  scratch.logits = p.scores != nullptr ? p.workspace + plan.partial_out_floats : nullptr;
  scratch.lse =
      reinterpret_cast<PartialLse*>(p.workspace + plan.partial_out_floats + plan.logits_floats);
  const cudaError_t error = launch_splits(p, plan, scratch, stream);
  if (error != cudaSuccess) return error;
  const int64_t combined = plan.num_splits > 1 ? p.heads.num_heads_q : 0;
  const int64_t scored = p.scores != nullptr ? ceil_div(p.capacity, kDecodeThreads) : 0;
  const dim3 grid(static_cast<unsigned>(combined + scored),
                  static_cast<unsigned>(at_most(p.batch, kMostGridRows)));
  return launch_kernel(decode_combine_kernel, grid, dim3(kDecodeThreads), 0, stream, p, scratch,
                       static_cast<unsigned>(combined));
}

}  // namespace pruneops
