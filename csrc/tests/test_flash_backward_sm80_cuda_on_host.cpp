// The backward pass with mma.sync, run on the CPU, against gradients in double precision: ragged
// segments, every head dim and dtype, head groups, limits, gradients of the LSE, NaN wherever
// nothing may be read, in several orders of threads and blocks. The gradients in double precision
// are themselves held against differences of the forward computation.

#include "attention/cuda/flash_backward.cu"
#include "attention/cuda/flash_backward_sm80_hd128.cu"
#include "attention/cuda/flash_backward_sm80_hd64.cu"
#include "attention/cuda/flash_backward_sm80_hd80.cu"
#include "attention/cuda/flash_backward_sm80_hd96.cu"
#include "attention/cuda/flash_forward.cu"
#include "attention/cuda/flash_forward_sm80_hd128.cu"
#include "attention/cuda/flash_forward_sm80_hd64.cu"
#include "attention/cuda/flash_forward_sm80_hd80.cu"
#include "attention/cuda/flash_forward_sm80_hd96.cu"
#include "attention/cuda/flash_schedule.cu"
#include "flash_backward_case.h"

namespace {

using namespace pruneops::testing;
using pruneops::FloatType;

constexpr pruneops::FlashDevice kDevice = {108, 80, 163 << 10};
constexpr int64_t kHeadDims[] = {64, 80, 96, 128};
constexpr FloatType kTypes[] = {FloatType::kBFloat16, FloatType::kFloat16};

void gradients_equal_double_precision() {
  unsigned seed = 1;
  for (const FlashCase& c : flash_cases()) {
    for (int64_t head_dim : kHeadDims) {
      check_flash_backward(c, head_dim, kTypes[seed % 2], seed, seed % 3 != 0, 1 + seed % 2,
                           kDevice);
      ++seed;
    }
    ++seed;  // so that each head dim meets either type
  }
  check_flash_backward(many_segments(150, 3, 5), 64, FloatType::kBFloat16, 70, true, 1, kDevice);
  FlashCase several_steps{"several steps", {0, 150, 320}, {0, 260, 270}, 320, 270, 1, 1};
  check_flash_backward(several_steps, 80, FloatType::kFloat16, 71, true, 1, kDevice);
}

// The gradients that the kernels are held against, against differences of sum(out dout) +
// sum(lse dlse). Inputs are multiples of the step, so that they are exact in fp16.
void reference_equals_differences() {
  FlashCase c{"differences", {0, 3, 5}, {0, 5, 6}, 5, 6};
  c.heads_q = 4;
  FlashInputs in(c, 16, FloatType::kFloat16, 100);
  constexpr float kStep = 1.0f / 64.0f;
  FlashTensor* inputs[] = {&in.q, &in.k, &in.v, &in.dout};
  for (FlashTensor* x : inputs) {
    for (uint16_t& bits : x->bits) {
      pruneops::Half half{bits};
      pruneops::from_float(std::round(pruneops::to_float(half) / kStep) * kStep, &half);
      bits = half.bits;
    }
  }
  const FlashResults exact = attend<double>(in, true);
  const std::vector<double> dout = in.dout.values();
  const auto loss = [&] {
    const FlashResults r = attend<double>(in, false);
    double sum = 0.0;
    for (size_t i = 0; i < dout.size(); ++i) sum += r.out[i] * dout[i];
    for (size_t i = 0; i < r.lse.size(); ++i) {
      if (!std::isinf(r.lse[i])) sum += r.lse[i] * in.dlse[i];
    }
    return sum;
  };
  const std::vector<double>* gradients[] = {&exact.dq, &exact.dk, &exact.dv};
  for (int which = 0; which < 3; ++which) {
    FlashTensor& x = *inputs[which];
    for (size_t i = 0; i < x.bits.size(); i += 7) {
      const auto difference = [&](float step) {
        const uint16_t bits = x.bits[i];
        const float value = pruneops::to_float(pruneops::Half{bits});
        double of[2];
        for (int side = 0; side < 2; ++side) {
          pruneops::Half moved;
          pruneops::from_float(side == 0 ? value - step : value + step, &moved);
          x.bits[i] = moved.bits;
          of[side] = loss();
        }
        x.bits[i] = bits;
        return (of[1] - of[0]) / (2.0 * step);
      };
      // The errors of second order cancel.
      const double expected = (4.0 * difference(kStep) - difference(2.0f * kStep)) / 3.0;
      CHECK(std::abs((*gradients[which])[i] - expected) <= 1e-5);
    }
  }
}

}  // namespace

int main() {
  reference_equals_differences();
  gradients_equal_double_precision();
  check_flash_backward_in_every_order(kDevice);
  check_flash_backward_with_scales_of_any_kind(kDevice);
  CHECK(cuda_on_host::bank_conflicts == 0);
  return 0;
}
