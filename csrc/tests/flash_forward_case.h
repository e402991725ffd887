// Runs the forward pass on the batches of flash_case.h and checks it against attention in double
// precision, in several orders of threads and blocks.

#pragma once

#include "flash_case.h"

namespace pruneops::testing {

struct FlashOutput {
  FlashTensor out;
  std::vector<float> lse;
};

// Results and scratch are poison to begin with.
inline FlashOutput run_flash_forward(FlashInputs& in, const FlashDevice& device) {
  FlashOutput output{FlashTensor(in.shape.total_q, in.heads.num_heads_q, in.heads.head_dim,
                                 in.shape.padding, in.type),
                     std::vector<float>(in.heads.num_heads_q * in.shape.total_q, NAN)};
  FlashForwardParams p{};
  p.segments = in.flash_segments();
  std::vector<int32_t> schedule(flash_schedule_ints(p.segments.num_segments), -1);
  p.q = in.q.view();
  p.k = in.k.view(in.shape.capacity);
  p.v = in.v.view(in.shape.capacity);
  p.out = output.out.view();
  p.softmax_lse = output.lse.data();
  p.heads = in.heads;
  p.visibility = in.visibility();
  p.softmax_scale = in.scale;
  p.schedule = schedule.data();
  CHECK(launch_flash_forward(p, device, nullptr) == cudaSuccess);
  return output;
}

//   schedules  numbers of all_schedules()
inline void check_flash_forward(const FlashCase& c, int64_t head_dim, FloatType type, unsigned seed,
                                const FlashDevice& device, const std::vector<size_t>& schedules) {
  FlashInputs in(c, head_dim, type, seed);
  const FlashResults exact = attend<double>(in, false), plain = attend<float>(in, false);
  const std::string what = c.name + ", head_dim " + std::to_string(head_dim) +
                           (type == FloatType::kBFloat16 ? ", bf16" : ", fp16");
  std::vector<uint16_t> first;
  for (size_t s : schedules) {
    cuda_on_host::schedule = cuda_on_host::all_schedules()[s];
    const FlashOutput output = run_flash_forward(in, device);
    if (first.empty()) first = output.out.bits;
    CHECK(output.out.bits == first);  // the same bits in every order, and gaps untouched
    check_errors(what, output.out.values(), exact.out, plain.out, 2.0, type);
    check_lse(what, output.lse, exact.lse);
  }
}

}  // namespace pruneops::testing
