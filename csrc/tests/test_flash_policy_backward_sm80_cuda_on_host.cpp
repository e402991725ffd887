// The gradients of policy attention with mma.sync, run on the CPU, against double precision: ragged
// segments, every head dim and dtype, head groups, policies of any numbers, dropped keys that
// outweigh all others, NaN wherever nothing may be read, in several orders of threads and blocks.

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
using pruneops::Segment;

constexpr FloatType kTypes[] = {FloatType::kBFloat16, FloatType::kFloat16};

// [rows, heads, head_dim] without gaps, dpolicy [total].
struct ExactGradients {
  std::vector<double> dq, dk, dv, dpolicy;
};

// Every sum in Real, as in attend(): float is the straightforward computation.
template <class Real>
ExactGradients policy_gradients(const PolicyInputs& in) {
  const auto handed_on = [&](Real x) {
    return sizeof(Real) == sizeof(float)
               ? static_cast<Real>(rounded(static_cast<float>(x), in.type))
               : x;
  };
  const int64_t dims = in.heads.head_dim, heads_q = in.heads.num_heads_q;
  const int64_t heads_k = in.heads.num_heads_k, total = in.shape.total_q;
  std::vector<Real> dq(total * heads_q * dims, 0), dk(total * heads_k * dims, 0), dv(dk);
  std::vector<Real> dpolicy(total, 0);
  for (const Segment& s : in.segments) {
    for (int64_t i = 0; i < s.q_len; ++i) {
      for (int64_t h = 0; h < heads_q; ++h) {
        const int64_t row = s.q_begin + i, head_k = h / in.heads.group;
        const auto key_at = [&](const FlashTensor& x, int64_t j, int64_t d) {
          return static_cast<Real>(x.at(s.k_begin + j, head_k, d));
        };
        const auto gradient_at = [&](int64_t d) {
          return static_cast<Real>(in.dout.at(row, h, d));
        };
        std::vector<Real> x(i + 1), out(dims, 0);
        for (int64_t j = 0; j <= i; ++j) {
          Real dot = 0;
          for (int64_t d = 0; d < dims; ++d)
            dot += static_cast<Real>(in.q.at(row, h, d)) * key_at(in.k, j, d);
          x[j] = dot * in.scale;
        }
        const Real most = *std::max_element(x.begin(), x.end());
        Real sum = 0;
        for (int64_t j = 0; j <= i; ++j) {
          x[j] = std::exp(x[j] - most);
          sum += x[j] * in.count(s, i, j);
        }
        const Real inverse = 1 / (sum + static_cast<Real>(in.epsilon));
        const Real share = static_cast<Real>(in.epsilon) / static_cast<Real>(s.k_len) * inverse;
        for (Real& e : x) e *= inverse;
        for (int64_t j = 0; j < s.k_len; ++j) {
          const Real weight = j <= i ? handed_on(x[j] * in.count(s, i, j)) : 0;
          Real* to = &dv[((s.k_begin + j) * heads_k + head_k) * dims];
          for (int64_t d = 0; d < dims; ++d) {
            out[d] += (weight + share) * key_at(in.v, j, d);
            to[d] += (weight + share) * gradient_at(d);
          }
        }
        Real delta = 0;
        for (int64_t d = 0; d < dims; ++d) delta += handed_on(out[d]) * gradient_at(d);
        for (int64_t j = 0; j <= i; ++j) {
          Real dp = 0;
          for (int64_t d = 0; d < dims; ++d) dp += gradient_at(d) * key_at(in.v, j, d);
          const Real change = x[j] * (dp - delta);
          if (j != i) dpolicy[s.k_begin + j] += change;
          const Real ds = handed_on(change * in.count(s, i, j));
          for (int64_t d = 0; d < dims; ++d) {
            dq[(row * heads_q + h) * dims + d] += ds * key_at(in.k, j, d);
            dk[((s.k_begin + j) * heads_k + head_k) * dims + d] +=
                ds * static_cast<Real>(in.q.at(row, h, d));
          }
        }
      }
    }
  }
  for (Real& e : dq) e = handed_on(e * in.scale);
  for (Real& e : dk) e = handed_on(e * in.scale);
  for (Real& e : dv) e = handed_on(e);
  return {{dq.begin(), dq.end()},
          {dk.begin(), dk.end()},
          {dv.begin(), dv.end()},
          {dpolicy.begin(), dpolicy.end()}};
}

struct PolicyGradients {
  FlashTensor dq, dk, dv;
  std::vector<float> dpolicy;  // [total]
  bool operator==(const PolicyGradients& other) const {
    return dq.bits == other.dq.bits && dk.bits == other.dk.bits && dv.bits == other.dv.bits &&
           dpolicy == other.dpolicy;
  }
};

// Exact results of the forward pass are handed to the backward pass, or those of our own. Results
// and scratch are poison to begin with, and so is what belongs to rows of no segment.
PolicyGradients run_backward(PolicyInputs& in, const PolicyResults& exact, bool own_forward) {
  const int64_t total = in.shape.total_q, num_heads_q = in.heads.num_heads_q;
  const int64_t dims = in.heads.head_dim, padding = in.shape.padding;
  const int64_t num_segments = static_cast<int64_t>(in.shape.cu_q.size()) - 1;
  const FlashTensor rows(total, num_heads_q, dims, padding, in.type);
  const FlashTensor keys(total, in.heads.num_heads_k, dims, padding, in.type);
  PolicyGradients result{rows, keys, keys, std::vector<float>(total, NAN)};
  FlashTensor out = rows;
  std::vector<float> max(num_heads_q * total, NAN), sum(max);
  std::vector<float> of_heads(in.heads.num_heads_k * total, NAN);
  std::vector<float> delta(2 * pruneops::flash_row_terms(total, num_heads_q), NAN);
  std::vector<float> sums(num_segments * in.heads.num_heads_k * dims, NAN);
  std::vector<int32_t> bounds(2 * num_segments + 2, -1);
  std::vector<int32_t> schedule(2 * pruneops::flash_schedule_ints(num_segments), -1);
  pruneops::CudaPolicyBackwardParams p{};
  pruneops::CudaPolicyParams& f = p.forward;
  f.q = in.q.view();
  f.k = in.k.view();
  f.v = in.v.view();
  f.out = out.view();
  f.heads = in.heads;
  f.policy = in.policy.data();
  f.cu_seqlens = in.shape.cu_q.data();
  f.num_segments = num_segments;
  f.total = total;
  f.softmax_scale = in.scale;
  f.epsilon = in.epsilon;
  f.softmax_max = max.data();
  f.softmax_sum = sum.data();
  f.bounds = bounds.data();
  f.schedule = schedule.data();
  f.sums = sums.data();
  if (own_forward) {
    CHECK(pruneops::launch_policy_forward(f, nullptr) == cudaSuccess);
    std::fill(sums.begin(), sums.end(), NAN);
    std::fill(bounds.begin(), bounds.end(), -1);
    std::fill(schedule.begin(), schedule.end(), -1);
  } else {
    for (const Segment& s : in.segments) {
      for (int64_t at = s.q_begin * num_heads_q; at < (s.q_begin + s.q_len) * num_heads_q; ++at) {
        const int64_t row = at / num_heads_q, head = at % num_heads_q, i = head * total + row;
        max[i] = static_cast<float>(exact.max[i]);
        sum[i] = static_cast<float>(exact.sum[i]);
        for (int64_t d = 0; d < dims; ++d)
          out.set(row, head, d, static_cast<float>(exact.out[at * dims + d]));
      }
    }
  }
  p.dout = in.dout.view();
  p.dq = result.dq.view();
  p.dk = result.dk.view();
  p.dv = result.dv.view();
  p.dpolicy = result.dpolicy.data();
  p.dpolicy_of_heads = of_heads.data();
  p.delta = delta.data();
  CHECK(pruneops::launch_policy_backward(p, nullptr) == cudaSuccess);
  return result;
}

// What lies between heads and rows is as it was.
void check_gaps(FlashTensor x) {
  for (int64_t i = 0; i < x.rows * x.heads * x.head_dim; ++i)
    x.bits_of(i / (x.heads * x.head_dim), i / x.head_dim % x.heads, i % x.head_dim) = 0x7fff;
  CHECK(std::all_of(x.bits.begin(), x.bits.end(), [](uint16_t b) { return b == 0x7fff; }));
}

//   schedules  numbers of all_schedules()
void check_backward(PolicyInputs& in, const std::vector<size_t>& schedules,
                    bool own_forward = false) {
  const PolicyResults output = attend_under_policy<double>(in);
  const ExactGradients exact = policy_gradients<double>(in), plain = policy_gradients<float>(in);
  const std::string what = in.shape.name + ", head_dim " + std::to_string(in.heads.head_dim) +
                           (in.type == FloatType::kBFloat16 ? ", bf16, " : ", fp16, ");
  std::vector<PolicyGradients> first;
  for (size_t s : schedules) {
    cuda_on_host::schedule = cuda_on_host::all_schedules()[s];
    const PolicyGradients got = run_backward(in, output, own_forward);
    if (first.empty()) first.push_back(got);
    for (const FlashTensor* x : {&got.dq, &got.dk, &got.dv}) check_gaps(*x);
    check_errors(what + "dq", got.dq.values(), exact.dq, plain.dq, 3.0, in.type);
    check_errors(what + "dk", got.dk.values(), exact.dk, plain.dk, 3.0, in.type);
    check_errors(what + "dv", got.dv.values(), exact.dv, plain.dv, 3.0, in.type);
    check_errors(what + "dpolicy", {got.dpolicy.begin(), got.dpolicy.end()}, exact.dpolicy,
                 plain.dpolicy, 3.0, FloatType::kFloat32);
    CHECK(got == first[0]);  // the same bits in every order
  }
}

void every_case_in_every_kernel() {
  unsigned seed = 1;
  for (PolicyCase c : policy_cases()) {
    // Sums that are 0 but for a little have gradients beyond what fp16 can say.
    for (float& count : c.counts) count = std::abs(count);
    for (int64_t head_dim : {64, 80, 96, 128}) {
      PolicyInputs in(c, head_dim, kTypes[seed % 2], seed);
      check_backward(in, {seed % 6});
      ++seed;
    }
    ++seed;  // so that each head dim meets either type
  }
}

// Every head dim and dtype, behind our own forward pass, in every order.
void gradients_are_the_same_in_every_order() {
  PolicyCase c{"orders", boundaries({37, 0, 70, 9}, 1), 120, 6, 2};
  c.padding = 8;
  for (int64_t head_dim : {64, 80, 96, 128}) {
    for (FloatType type : kTypes) {
      PolicyInputs in(c, head_dim, type, 80);
      check_backward(in, {0, 1, 2, 3, 4, 5}, true);
    }
  }
}

// A warp's first row, or a tile's, may then have its own key last in a tile of keys.
void groups_may_be_large() {
  PolicyCase c{"17 heads a key head", {0, 70}, 70, 17, 1};
  PolicyInputs in(c, 64, FloatType::kFloat16, 7);
  check_backward(in, {4});
}

// Sums may be negative then.
void policies_may_be_negative() {
  PolicyCase c{"negative sums", {0, 70}, 70, 4, 2};
  c.counts = {-20.0f, -30.0f};
  for (FloatType type : kTypes) {
    PolicyInputs in(c, 64, type, 6);
    check_backward(in, {0}, true);
  }
}

// The first key is 10 to 60 above the others in every row's logits, and counts nothing. What is
// left outweighs epsilon, else there would be nothing to see but errors of rounding.
void dropped_keys_may_outweigh_all_others() {
  struct Choice {
    float above, epsilon;
  };
  for (FloatType type : kTypes) {
    for (const Choice& c : {Choice{10, 1e-6f}, Choice{20, 1e-20f}, Choice{20, 0}, Choice{60, 0}}) {
      PolicyInputs in({"dropped key", {0, 100}, 100, 1, 1, 1.0f / 64, c.epsilon}, 64, type, 5);
      for (int64_t i = 0; i < 100; ++i) in.q.set(i, 0, 0, 8.0f);
      for (int64_t j = 0; j < 100; ++j) in.k.set(j, 0, 0, j == 0 ? 8.0f * c.above : 0.0f);
      in.policy[0] = 0.0f;
      check_backward(in, {0});
    }
  }
}

void scale_may_be_zero() {
  PolicyInputs in(policy_cases()[1], 64, FloatType::kBFloat16, 3);
  in.scale = 0.0f;
  check_backward(in, {0}, true);
}

// Rows that do not begin on 16 bytes are the plain kernels', with the same results.
void rows_may_lie_anywhere() {
  PolicyCase c{"rows off 16 bytes", {0, 30, 100}, 100};
  c.padding = 3;
  PolicyInputs in(c, 64, FloatType::kBFloat16, 3);
  check_backward(in, {0}, true);
}

void many_segments_of_few_rows() {
  PolicyCase c{"many segments", {0}, 0, 1, 1};
  for (int b = 0; b < 150; ++b) c.cu.push_back(c.cu.back() + b * 7 % 5);
  c.total = c.cu.back() + 2;
  PolicyInputs in(c, 80, FloatType::kFloat16, 9);
  check_backward(in, {3});
}

}  // namespace

int main() {
  every_case_in_every_kernel();
  gradients_are_the_same_in_every_order();
  groups_may_be_large();
  policies_may_be_negative();
  dropped_keys_may_outweigh_all_others();
  scale_may_be_zero();
  rows_may_lie_anywhere();
  many_segments_of_few_rows();
  CHECK(cuda_on_host::bank_conflicts == 0);
  return 0;
}
