// The attention kernels against a double-precision dense computation, on every instruction set of
// this machine, with outputs and scratch memory poisoned beforehand.

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "attention/attention.h"
#include "attention/cpu/plan.h"
#include "attention/positions.h"
#include "attention_case.h"
#include "check.h"
#include "common/float_types.h"

namespace pruneops {
namespace {

using namespace testing;

// Runs forward; out and lse are filled.
void run_forward(const AttentionKernels& kernels, Case& c, Rows* out, std::vector<float>& lse) {
  const ParallelFor parallel = two_threads();
  char* workspace;
  const std::vector<char> memory = poisoned_workspace(kernels, c.heads, &workspace);
  const std::vector<Block> blocks =
      forward_blocks(c.segments, c.heads, c.visibility, kernels.forward_rows, 2);
  lse.assign(c.heads.num_heads_q * c.total_q() + 1, kNan);
  ForwardParams params{};
  params.q = c.q.view();
  params.k = c.k.view();
  params.v = c.v.view();
  if (out != nullptr) params.out = out->view();
  params.softmax_lse = lse.data();
  params.lse_stride = c.total_q();
  params.heads = c.heads;
  params.visibility = c.visibility;
  params.softmax_scale = c.scale;
  params.segments = c.segments.data();
  params.blocks = blocks.data();
  params.num_blocks = static_cast<int64_t>(blocks.size());
  kernels.forward(params, parallel, workspace);
}

void test_forward(const AttentionKernels& kernels, Case& c) {
  Rows out(c.type, c.total_q(), c.heads.num_heads_q, c.heads.head_dim, false);
  std::vector<float> lse, lse_only;
  run_forward(kernels, c, &out, lse);
  run_forward(kernels, c, nullptr, lse_only);
  for (const Segment& s : c.segments) {
    for (int64_t i = 0; i < s.q_len; ++i) {
      for (int64_t h = 0; h < c.heads.num_heads_q; ++h) {
        double expected_lse;
        const std::vector<double> p = c.softmax(s, i, h, expected_lse);
        const float got_lse = lse[h * c.total_q() + s.q_begin + i];
        CHECK(lse_only[h * c.total_q() + s.q_begin + i] == got_lse);
        if (p.empty()) CHECK(got_lse == -kInf);
        if (!p.empty()) check_close(got_lse, expected_lse, 2e-6 * 8);
        for (int64_t d = 0; d < c.heads.head_dim; ++d) {
          double expected = 0.0;
          for (size_t j = 0; j < p.size(); ++j) {
            expected += p[j] * c.v.at(s.k_begin + j, h / c.heads.group, d);
          }
          check_close(out.at(s.q_begin + i, h, d), expected, tolerance(c.type));
        }
      }
    }
  }
}

void test_backward(const AttentionKernels& kernels, Case& c, int plan_threads) {
  const Heads& heads = c.heads;
  const int64_t d_ = heads.head_dim, total_q = c.total_q();
  Rows out(c.type, total_q, heads.num_heads_q, d_, false);
  Rows dq(c.type, total_q, heads.num_heads_q, d_, false);
  Rows dk(c.type, c.total_k(), heads.num_heads_k, d_, false);
  Rows dv(c.type, c.total_k(), heads.num_heads_k, d_, false);
  std::vector<float> lse;
  run_forward(kernels, c, &out, lse);
  std::vector<float> dlse(lse.size());
  std::normal_distribution<float> normal;
  for (float& x : dlse) x = normal(generator());

  char* workspace;
  const std::vector<char> memory = poisoned_workspace(kernels, heads, &workspace);
  std::vector<float> accumulator(total_q * heads.num_heads_q * padded_head_dim(d_) + 1, kNan);
  std::vector<float> delta(total_q * heads.num_heads_q + 1, kNan);
  const BackwardBlocks blocks = backward_blocks(
      c.segments, heads, c.visibility, kernels.backward_rows, kernels.backward_keys, plan_threads);
  BackwardParams params{};
  params.dout = c.dout.view();
  params.q = c.q.view();
  params.k = c.k.view();
  params.v = c.v.view();
  params.out = out.view();
  params.softmax_lse = lse.data();
  params.dsoftmax_lse = dlse.data();
  params.lse_stride = total_q;
  params.dq = dq.view();
  params.dk = dk.view();
  params.dv = dv.view();
  params.dq_accumulator = accumulator.data();
  params.delta = delta.data();
  params.heads = heads;
  params.visibility = c.visibility;
  params.softmax_scale = c.scale;
  params.segments = c.segments.data();
  params.row_blocks = blocks.rows.data();
  params.num_row_blocks = static_cast<int64_t>(blocks.rows.size());
  params.key_blocks = blocks.keys.data();
  params.num_key_blocks = static_cast<int64_t>(blocks.keys.size());
  kernels.backward(params, two_threads(), workspace);

  std::vector<double> rk(c.total_k() * heads.num_heads_k * d_ + 1), rv(rk.size());
  const double tol = 20 * tolerance(c.type);
  for (const Segment& s : c.segments) {
    for (int64_t i = 0; i < s.q_len; ++i) {
      for (int64_t h = 0; h < heads.num_heads_q; ++h) {
        const int64_t hk = h / heads.group, row = s.q_begin + i;
        double unused, mean = 0.0;
        const std::vector<double> p = c.softmax(s, i, h, unused);
        std::vector<double> dp(p.size()), rq(d_);
        for (size_t j = 0; j < p.size(); ++j) {
          for (int64_t d = 0; d < d_; ++d) {
            dp[j] += c.dout.at(row, h, d) * c.v.at(s.k_begin + j, hk, d);
            rv[((s.k_begin + j) * heads.num_heads_k + hk) * d_ + d] += p[j] * c.dout.at(row, h, d);
          }
          mean += p[j] * dp[j];
        }
        for (size_t j = 0; j < p.size(); ++j) {
          const double ds = p[j] * (dp[j] - mean + dlse[h * total_q + row]) * c.scale;
          for (int64_t d = 0; d < d_; ++d) {
            rq[d] += ds * c.k.at(s.k_begin + j, hk, d);
            rk[((s.k_begin + j) * heads.num_heads_k + hk) * d_ + d] += ds * c.q.at(row, h, d);
          }
        }
        for (int64_t d = 0; d < d_; ++d) check_close(dq.at(row, h, d), rq[d], tol);
      }
    }
  }
  for (int64_t i = 0; i < c.total_k() * heads.num_heads_k * d_; ++i) {
    const int64_t d = i % d_, hk = i / d_ % heads.num_heads_k, row = i / d_ / heads.num_heads_k;
    check_close(dk.at(row, hk, d), rk[i], tol);
    check_close(dv.at(row, hk, d), rv[i], tol);
  }
}

double reduced(Reduce reduce, const std::vector<double>& values) {
  double sum = 0.0, most = 0.0;
  for (double v : values) {
    sum += v;
    most = std::max(most, v);
  }
  if (reduce == Reduce::kMax) return most;
  return reduce == Reduce::kMean && !values.empty() ? sum / values.size() : sum;
}

void test_scores(const AttentionKernels& kernels, Case& c, bool direct) {
  const Heads& heads = c.heads;
  if (direct) {
    for (Segment& s : c.segments) s.q_len = std::min(s.q_len, kDirectQueries);
  }
  std::vector<float> lse;
  run_forward(kernels, c, nullptr, lse);
  std::vector<float> scores(c.total_k() + 1, kNan);
  std::vector<float> raw(heads.num_heads_q * kDirectQueries * c.total_k() + 1, kNan);
  std::vector<float> row_lse(heads.num_heads_q * c.total_q() + 1, kNan);
  const std::vector<Block> blocks = key_blocks(c.segments, c.visibility, 64, 16, 1, 2);
  char* workspace;
  const std::vector<char> memory = poisoned_workspace(kernels, heads, &workspace);
  ScoreParams params{};
  params.q = c.q.view();
  params.k = c.k.view();
  params.softmax_lse = lse.data();
  params.lse_stride = c.total_q();
  params.scores = scores.data();
  params.raw_scores = raw.data();
  params.row_lse = row_lse.data();
  params.total_k = c.total_k();
  params.total_q = c.total_q();
  params.heads = heads;
  params.visibility = c.visibility;
  params.softmax_scale = c.scale;
  params.head_reduce = static_cast<Reduce>(random_int(0, 2));
  params.query_reduce = static_cast<Reduce>(random_int(0, 2));
  params.segments = c.segments.data();
  params.num_segments = static_cast<int64_t>(c.segments.size());
  params.blocks = blocks.data();
  params.num_blocks = static_cast<int64_t>(blocks.size());
  (direct ? kernels.direct_scores : kernels.column_scores)(params, two_threads(), workspace);

  for (const Segment& s : c.segments) {
    std::vector<std::vector<double>> p(s.q_len * heads.num_heads_q);
    double unused;
    for (size_t i = 0; i < p.size(); ++i) {
      p[i] = c.softmax(s, i / heads.num_heads_q, i % heads.num_heads_q, unused);
    }
    for (int64_t j = 0; j < s.k_len; ++j) {
      std::vector<double> rows(s.q_len);
      for (int64_t i = 0; i < s.q_len; ++i) {
        std::vector<double> of_heads(heads.num_heads_q);
        for (int64_t h = 0; h < heads.num_heads_q; ++h) {
          const std::vector<double>& row = p[i * heads.num_heads_q + h];
          of_heads[h] = j < static_cast<int64_t>(row.size()) ? row[j] : 0.0;
        }
        rows[i] = reduced(params.head_reduce, of_heads);
      }
      check_close(scores[s.k_begin + j], reduced(params.query_reduce, rows), 1e-5);
    }
  }
}

// Decoding is attention of the last query of each segment to all keys of the segment.
void test_decode(const AttentionKernels& kernels, Case& c, int64_t num_splits) {
  const Heads& heads = c.heads;
  const int64_t batch = static_cast<int64_t>(c.segments.size()), d_ = heads.head_dim;
  int64_t capacity = 3;
  for (const Segment& s : c.segments) capacity = std::max(capacity, s.k_len + 1);
  Rows k(c.type, batch * capacity, heads.num_heads_k, d_, false);
  Rows v(c.type, batch * capacity, heads.num_heads_k, d_, false);
  Rows q(c.type, batch, heads.num_heads_q, d_, true);
  Rows out(c.type, batch, heads.num_heads_q, d_, false);
  std::vector<int32_t> lengths(batch);
  for (int64_t b = 0; b < batch; ++b) {
    const Segment& s = c.segments[b];
    lengths[b] = static_cast<int32_t>(s.k_len);
    for (int64_t j = 0; j < s.k_len; ++j) {
      for (int64_t i = 0; i < heads.num_heads_k * d_; ++i) {
        const int64_t to = (b * capacity + j) * k.row_stride + i / d_ * k.head_stride + i % d_;
        k.set(to, static_cast<float>(c.k.at(s.k_begin + j, i / d_, i % d_)));
        v.set(to, static_cast<float>(c.v.at(s.k_begin + j, i / d_, i % d_)));
      }
    }
  }
  const int64_t rows = batch * heads.num_heads_q;
  std::vector<float> lse(rows + 1, kNan), scores(batch * capacity + 1, kNan);
  std::vector<float> raw(rows * capacity + 1, kNan),
      partial(num_splits * rows * (d_ + 2) + 1, kNan);
  char* workspace;
  const std::vector<char> memory = poisoned_workspace(kernels, heads, &workspace);
  DecodeParams params{};
  params.q = q.view();
  params.k = k.view();
  params.v = v.view();
  params.k.slot_stride = params.v.slot_stride = capacity * k.row_stride;
  params.out = out.view();
  params.softmax_lse = lse.data();
  params.scores = scores.data();
  params.raw_scores = raw.data();
  params.partial_out = partial.data();
  params.partial_max = params.partial_out + num_splits * rows * d_;
  params.partial_sum = params.partial_max + num_splits * rows;
  params.lengths = lengths.data();
  params.batch = batch;
  params.capacity = capacity;
  params.num_splits = num_splits;
  params.heads = heads;
  params.softmax_scale = c.scale;
  kernels.decode(params, two_threads(), workspace);

  c.q = q;
  c.visibility = Visibility{};
  c.kv_limit.clear();
  for (int64_t b = 0; b < batch; ++b) {
    Segment s = c.segments[b];
    s.q_begin = b;
    std::vector<double> mean(capacity);
    for (int64_t h = 0; h < heads.num_heads_q; ++h) {
      double expected_lse;
      const std::vector<double> p = c.softmax(s, 0, h, expected_lse);
      if (p.empty()) CHECK(lse[h * batch + b] == -kInf);
      if (!p.empty()) check_close(lse[h * batch + b], expected_lse, 2e-5);
      for (int64_t d = 0; d < d_; ++d) {
        double expected = 0.0;
        for (size_t j = 0; j < p.size(); ++j) {
          expected += p[j] * c.v.at(s.k_begin + j, h / heads.group, d);
        }
        check_close(out.at(b, h, d), expected, tolerance(c.type));
      }
      for (size_t j = 0; j < p.size(); ++j) mean[j] += p[j] / heads.num_heads_q;
    }
    for (int64_t j = 0; j < capacity; ++j) check_close(scores[b * capacity + j], mean[j], 1e-5);
  }
}

void test_float_types() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const Half half{static_cast<uint16_t>(bits)};
    const BFloat16 bfloat{static_cast<uint16_t>(bits)};
    Half half_back;
    BFloat16 bfloat_back;
    from_float(to_float(half), &half_back);
    from_float(to_float(bfloat), &bfloat_back);
    if (!std::isnan(to_float(half))) CHECK(half_back.bits == bits);
    if (std::isnan(to_float(half))) CHECK(std::isnan(to_float(half_back)));
    if (!std::isnan(to_float(bfloat))) CHECK(bfloat_back.bits == bits);
    if (std::isnan(to_float(bfloat))) CHECK(std::isnan(to_float(bfloat_back)));
  }
  // Halfway between two halves, and just past it.
  Half h;
  from_float(1.0f + 0x1p-11f, &h);
  CHECK(h.bits == 0x3c00);
  from_float(1.0f + 0x1.8p-11f, &h);
  CHECK(h.bits == 0x3c01);
  from_float(65520.0f, &h);
  CHECK(h.bits == 0x7c00);
}

void test_positions() {
  const std::vector<int64_t> keys = {0, 3, 3, 9, 1, 2};
  const std::vector<int32_t> queries = {-1, 3, 100, 1};
  const std::vector<Segment> segments = {{0, 3, 0, 4, 0}, {3, 1, 4, 2, 0}};
  std::vector<int32_t> limit(4, -7);
  kv_limit_from_positions(queries.data(), keys.data(), segments, limit.data());
  CHECK((limit == std::vector<int32_t>{0, 3, 4, 1}));
}

}  // namespace
}  // namespace pruneops

int main() {
  using namespace pruneops;
  test_float_types();
  test_positions();
  const int64_t head_dims[] = {1, 5, 16, 80, 128, 256};
  const int64_t groups[] = {1, 4, 7};
  const FloatType types[] = {FloatType::kFloat32, FloatType::kBFloat16, FloatType::kFloat16};
  for (int isa = 0; isa <= static_cast<int>(best_isa()); ++isa) {
    if (!isa_compiled(static_cast<Isa>(isa))) continue;
    const AttentionKernels& kernels = attention_kernels(static_cast<Isa>(isa));
    for (int round = 0; round < 18; ++round) {
      const int64_t group = groups[round / 6], heads_k = random_int(1, 2);
      const Heads heads{heads_k * group, heads_k, head_dims[round % 6], group};
      const auto make = [&](int64_t longest) {
        return Case(heads, types[round % 3], random_int(0, 3), longest, round % 3);
      };
      const int64_t longest = group == 1 && heads.head_dim < 100 ? 150 : 40;
      Case forward = make(longest), backward = make(longest), split = make(longest);
      Case column = make(longest), direct = make(longest), decode = make(longest);
      test_forward(kernels, forward);
      test_backward(kernels, backward, 1);
      test_backward(kernels, split, 1000);
      test_scores(kernels, column, false);
      test_scores(kernels, direct, true);
      test_decode(kernels, decode, 1 + round % 3);
    }
  }
  return 0;
}
