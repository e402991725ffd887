// What the tests of the backward kernels share: a run on the inputs of flash_case.h, held against
// gradients in double precision.

#pragma once

#include "attention/cuda/flash_backward.h"
#include "flash_forward_case.h"

namespace pruneops::testing {

struct FlashGradients {
  FlashTensor dq, dk, dv;
  bool operator==(const FlashGradients& other) const {
    return dq.bits == other.dq.bits && dk.bits == other.dk.bits && dv.bits == other.dv.bits;
  }
};

// What a forward pass leaves in the rows of segments: the exact results, rounded. NaN in the
// others.
inline FlashOutput rounded_output(const FlashInputs& in, const FlashResults& exact) {
  const int64_t dims = in.heads.head_dim, heads = in.heads.num_heads_q;
  const int64_t total_q = in.shape.total_q;
  FlashOutput output{FlashTensor(total_q, heads, dims, in.shape.padding, in.type),
                     std::vector<float>(heads * total_q, NAN)};
  for (const Segment& s : in.segments) {
    for (int64_t i = s.q_begin; i < s.q_begin + s.q_len; ++i) {
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t d = 0; d < dims; ++d)
          output.out.set(i, h, d, static_cast<float>(exact.out[(i * heads + h) * dims + d]));
        output.lse[h * total_q + i] = static_cast<float>(exact.lse[h * total_q + i]);
      }
    }
  }
  return output;
}

// Results and scratch begin as NaN.
inline FlashGradients run_flash_backward(FlashInputs& in, FlashOutput& output, bool with_dlse,
                                         const FlashDevice& device) {
  const FlashCase& c = in.shape;
  const int64_t dims = in.heads.head_dim;
  FlashGradients result{FlashTensor(c.total_q, c.heads_q, dims, c.padding, in.type),
                        FlashTensor(c.total_k, c.heads_k, dims, c.padding, in.type),
                        FlashTensor(c.total_k, c.heads_k, dims, c.padding, in.type)};
  FlashBackwardParams p{};
  p.dout = in.dout.view();
  p.q = in.q.view();
  p.k = in.k.view();
  p.v = in.v.view();
  p.out = output.out.view();
  p.softmax_lse = output.lse.data();
  p.dsoftmax_lse = with_dlse ? in.dlse.data() : nullptr;
  p.dq = result.dq.view();
  p.dk = result.dk.view();
  p.dv = result.dv.view();
  p.heads = in.heads;
  p.segments = in.flash_segments();
  p.visibility = in.visibility();
  p.softmax_scale = in.scale;
  std::vector<FlashRowTerms> terms(flash_row_terms(c.total_q, c.heads_q), FlashRowTerms{NAN, NAN});
  std::vector<int32_t> schedule(2 * flash_schedule_ints(p.segments.num_segments), -1);
  p.row_terms = terms.data();
  p.schedule = schedule.data();
  CHECK(launch_flash_backward(p, device, nullptr) == cudaSuccess);
  return result;
}

// What lies between heads and rows is as it was.
inline void check_gaps(FlashTensor x) {
  for (int64_t i = 0; i < x.rows * x.heads * x.head_dim; ++i)
    x.bits_of(i / (x.heads * x.head_dim), i / x.head_dim % x.heads, i % x.head_dim) = 0x7fff;
  CHECK(std::all_of(x.bits.begin(), x.bits.end(), [](uint16_t b) { return b == 0x7fff; }));
}

// The same bits in every one of so many orders of threads and blocks, and right.
//   own_forward  whether the backward pass gets what our forward pass leaves, or exact results
inline void check_flash_backward(FlashInputs& in, unsigned seed, bool with_dlse,
                                 size_t num_schedules, const FlashDevice& device,
                                 bool own_forward = false) {
  for (const Segment& s : in.segments) {
    for (int64_t i = 0; i < s.q_len; ++i) {
      for (int64_t h = 0; h < in.heads.num_heads_q; ++h) {
        float& dlse = in.dlse[h * in.shape.total_q + s.q_begin + i];
        if (!with_dlse) dlse = 0.0f;
        // A row that sees no key has no gradient, whatever is said about its LSE.
        if (in.visible(s, i) == 0) dlse = NAN;
      }
    }
  }
  const FlashResults exact = attend<double>(in, true), plain = attend<float>(in, true);
  const std::string what = in.shape.name + ", head_dim " + std::to_string(in.heads.head_dim) +
                           (in.type == FloatType::kBFloat16 ? ", bf16, " : ", fp16, ");
  FlashOutput output = own_forward ? run_flash_forward(in, device) : rounded_output(in, exact);
  std::vector<FlashGradients> first;
  for (size_t s = 0; s < num_schedules; ++s) {
    const auto all = cuda_on_host::all_schedules();
    cuda_on_host::schedule = all[(s + seed) % all.size()];
    const FlashGradients got = run_flash_backward(in, output, with_dlse, device);
    if (first.empty()) first.push_back(got);
    CHECK(got == first[0]);
    check_gaps(got.dq);
    check_gaps(got.dk);
    check_gaps(got.dv);
    check_errors(what + "dq", got.dq.values(), exact.dq, plain.dq, 3.0, in.type);
    check_errors(what + "dk", got.dk.values(), exact.dk, plain.dk, 3.0, in.type);
    check_errors(what + "dv", got.dv.values(), exact.dv, plain.dv, 3.0, in.type);
  }
}

inline void check_flash_backward(const FlashCase& c, int64_t head_dim, FloatType type,
                                 unsigned seed, bool with_dlse, size_t num_schedules,
                                 const FlashDevice& device, bool own_forward = false) {
  FlashInputs in(c, head_dim, type, seed);
  check_flash_backward(in, seed, with_dlse, num_schedules, device, own_forward);
}

// Every head dim and dtype, behind our own forward pass, in every order.
inline void check_flash_backward_in_every_order(const FlashDevice& device) {
  FlashCase c{"orders", boundaries({37, 0, 9}, 1), boundaries({70, 4, 9}), 48, 85, 6, 2};
  c.padding = 8;
  for (int64_t head_dim : {64, 80, 96, 128}) {
    for (FloatType type : {FloatType::kBFloat16, FloatType::kFloat16}) {
      c.with_limit = type == FloatType::kFloat16;
      check_flash_backward(c, head_dim, type, 80, true, cuda_on_host::all_schedules().size(),
                           device, true);
    }
  }
}

inline void check_flash_backward_with_scales_of_any_kind(const FlashDevice& device) {
  for (float scale : {0.0f, -0.5f, 4.0f}) {
    FlashInputs in({"scale", {0, 20}, {0, 40}, 20, 40}, 64, FloatType::kFloat16, 90);
    in.scale = scale;
    check_flash_backward(in, 90, true, 1, device);
  }
}

}  // namespace pruneops::testing
