// Policy attention with mma.sync, run on the CPU, against double precision: ragged segments, every
// head dim and dtype, head groups, policies of any numbers, dropped keys that outweigh all others,
// NaN wherever nothing may be read, in several orders of threads and blocks.

#include "attention/cuda/flash_policy_backward_sm80_hd128.cu"
#include "attention/cuda/flash_policy_backward_sm80_hd64.cu"
#include "attention/cuda/flash_policy_backward_sm80_hd80.cu"
#include "attention/cuda/flash_policy_backward_sm80_hd96.cu"
#include "attention/cuda/flash_policy_forward_sm80_hd128.cu"
#include "attention/cuda/flash_policy_forward_sm80_hd64.cu"
#include "attention/cuda/flash_policy_forward_sm80_hd80.cu"
#include "attention/cuda/flash_policy_forward_sm80_hd96.cu"
#include "attention/cuda/flash_schedule.cu"
#include "attention/cuda/policy.cu"
#include "policy_case.h"

namespace {

using namespace pruneops::testing;
using pruneops::FloatType;

constexpr FloatType kTypes[] = {FloatType::kBFloat16, FloatType::kFloat16};

struct PolicyOutput {
  FlashTensor out;
  std::vector<float> max, sum;  // [heads_q, total]
};

// Results and scratch are poison to begin with.
PolicyOutput run_forward(PolicyInputs& in) {
  const int64_t total = in.shape.total_q;
  const int64_t num_segments = static_cast<int64_t>(in.shape.cu_q.size()) - 1;
  const std::vector<float> poison(in.heads.num_heads_q * total, NAN);
  PolicyOutput output{
      FlashTensor(total, in.heads.num_heads_q, in.heads.head_dim, in.shape.padding, in.type),
      poison, poison};
  std::vector<int32_t> bounds(2 * num_segments + 2, -1);
  std::vector<int32_t> schedule(pruneops::flash_schedule_ints(num_segments), -1);
  std::vector<float> sums(num_segments * in.heads.num_heads_k * in.heads.head_dim, NAN);
  pruneops::CudaPolicyParams p{};
  p.q = in.q.view();
  p.k = in.k.view();
  p.v = in.v.view();
  p.out = output.out.view();
  p.heads = in.heads;
  p.policy = in.policy.data();
  p.cu_seqlens = in.shape.cu_q.data();
  p.num_segments = num_segments;
  p.total = total;
  p.softmax_scale = in.scale;
  p.epsilon = in.epsilon;
  p.softmax_max = output.max.data();
  p.softmax_sum = output.sum.data();
  p.bounds = bounds.data();
  p.schedule = schedule.data();
  p.sums = sums.data();
  CHECK(pruneops::launch_policy_forward(p, nullptr) == cudaSuccess);
  return output;
}

void check_sums(const std::string& what, const PolicyOutput& got, const PolicyResults& exact) {
  for (size_t i = 0; i < exact.max.size(); ++i) {
    const double max = exact.max[i], error = std::isinf(max) ? 0.0 : 2e-5 * (1.0 + std::abs(max));
    const bool max_close = got.max[i] == max || std::abs(got.max[i] - max) <= error;
    // The sum is taken against the kernel's own maximum.
    const bool sum_close = std::abs(got.sum[i] - exact.sum[i]) <= error * exact.absolute[i];
    if (max_close && sum_close) continue;
    std::fprintf(stderr, "%s: row %zu has max %.9g and sum %.9g, expected %.9g and %.9g\n",
                 what.c_str(), i, got.max[i], got.sum[i], max, exact.sum[i]);
    std::exit(1);
  }
}

//   schedules  numbers of all_schedules()
void check_forward(PolicyInputs& in, const std::vector<size_t>& schedules) {
  const PolicyResults exact = attend_under_policy<double>(in);
  const PolicyResults plain = attend_under_policy<float>(in);
  const std::string what = in.shape.name + ", head_dim " + std::to_string(in.heads.head_dim) +
                           (in.type == FloatType::kBFloat16 ? ", bf16" : ", fp16");
  std::vector<uint16_t> first;
  for (size_t s : schedules) {
    cuda_on_host::schedule = cuda_on_host::all_schedules()[s];
    const PolicyOutput output = run_forward(in);
    if (first.empty()) first = output.out.bits;
    CHECK(output.out.bits == first);  // the same bits in every order, and gaps untouched
    check_errors(what, output.out.values(), exact.out, plain.out, 2.0, in.type);
    check_sums(what, output, exact);
  }
}

void every_case_in_every_kernel() {
  unsigned seed = 1;
  for (const PolicyCase& c : policy_cases()) {
    for (int64_t head_dim : {64, 80, 96, 128}) {
      for (FloatType type : kTypes) {
        PolicyInputs in(c, head_dim, type, seed);
        // Two orders for one of the types, all of them in turn.
        check_forward(in, seed % 2 == 0 ? std::vector<size_t>{seed % 6}
                                        : std::vector<size_t>{seed % 6, (seed / 6 + 3) % 6});
        ++seed;
      }
    }
  }
}

// The first key is 20 to 80 above the others in every row's logits, and counts nothing: what is
// left is far below what fp16 can say of probabilities against the largest.
void dropped_keys_may_outweigh_all_others() {
  for (FloatType type : kTypes) {
    for (float epsilon : {0.0f, 1e-6f, 1e-20f}) {
      for (float above : {10.0f, 20.0f, 60.0f}) {
        PolicyInputs in({"dropped key", {0, 100}, 100, 1, 1, 1.0f / 64, epsilon}, 64, type, 5);
        for (int64_t i = 0; i < 100; ++i) in.q.set(i, 0, 0, 8.0f);
        for (int64_t j = 0; j < 100; ++j) in.k.set(j, 0, 0, j == 0 ? 8.0f * above : 0.0f);
        in.policy[0] = 0.0f;
        check_forward(in, {0});
      }
    }
  }
}

// -inf times 0 is nowhere.
void scale_may_be_zero() {
  PolicyInputs in(policy_cases()[1], 64, FloatType::kBFloat16, 3);
  in.scale = 0.0f;
  check_forward(in, {0});
}

// Rows that do not begin on 16 bytes are the plain kernels', with the same results.
void rows_may_lie_anywhere() {
  PolicyCase c{"rows off 16 bytes", {0, 30, 100}, 100};
  c.padding = 3;
  PolicyInputs in(c, 64, FloatType::kBFloat16, 3);
  check_forward(in, {0});
}

void many_segments_of_few_rows() {
  PolicyCase c{"many segments", {0}, 0, 1, 1};
  for (int b = 0; b < 150; ++b) c.cu.push_back(c.cu.back() + b * 7 % 5);
  c.total = c.cu.back() + 2;
  PolicyInputs in(c, 80, FloatType::kFloat16, 9);
  check_forward(in, {0, 3});
}

}  // namespace

int main() {
  every_case_in_every_kernel();
  dropped_keys_may_outweigh_all_others();
  scale_may_be_zero();
  rows_may_lie_anywhere();
  many_segments_of_few_rows();
  return 0;
}
