// The backward pass of Hopper, run on the CPU, in several orders of threads and of arriving copies.

#define PRUNEOPS_WITH_SM90

#include "attention/cuda/flash_backward.cu"
#include "attention/cuda/flash_backward_sm80_hd128.cu"
#include "attention/cuda/flash_backward_sm80_hd64.cu"
#include "attention/cuda/flash_backward_sm80_hd80.cu"
#include "attention/cuda/flash_backward_sm80_hd96.cu"
#include "attention/cuda/flash_backward_sm90_hd128.cu"
#include "attention/cuda/flash_backward_sm90_hd64.cu"
#include "attention/cuda/flash_backward_sm90_hd80.cu"
#include "attention/cuda/flash_backward_sm90_hd96.cu"
#include "attention/cuda/flash_forward.cu"
#include "attention/cuda/flash_forward_sm80_hd128.cu"
#include "attention/cuda/flash_forward_sm80_hd64.cu"
#include "attention/cuda/flash_forward_sm80_hd80.cu"
#include "attention/cuda/flash_forward_sm80_hd96.cu"
#include "attention/cuda/flash_forward_sm90_hd128.cu"
#include "attention/cuda/flash_forward_sm90_hd64.cu"
#include "attention/cuda/flash_forward_sm90_hd80.cu"
#include "attention/cuda/flash_forward_sm90_hd96.cu"
#include "attention/cuda/flash_schedule.cu"
#include "flash_backward_case.h"

namespace {

using namespace pruneops::testing;
using pruneops::FloatType;

constexpr pruneops::FlashDevice kDevice = {132, 90, 227 << 10};
constexpr int64_t kHeadDims[] = {64, 80, 96, 128};
constexpr FloatType kTypes[] = {FloatType::kBFloat16, FloatType::kFloat16};

void gradients_equal_double_precision() {
  unsigned seed = 0;
  for (int64_t head_dim : kHeadDims) {
    unsigned number = static_cast<unsigned>(head_dim / 16);  // each case in either type
    for (const FlashCase& c : flash_cases()) {
      ++seed;
      check_flash_backward(c, head_dim, kTypes[number++ % 2], seed, seed % 3 != 0, 1 + seed % 2,
                           kDevice);
    }
  }
  check_flash_backward(many_segments(140, 9, 5), 80, FloatType::kFloat16, 70, true, 1, kDevice);
}

// More steps than have room in shared memory, and second warpgroups that nobody sees.
void steps_go_round_in_their_rings() {
  for (int64_t head_dim : kHeadDims) {
    FlashCase c{"long", {0, 300, 500}, {0, 420, 700}, 500, 700, 2, 1};
    c.causal = head_dim % 64 != 0;
    c.with_limit = head_dim == 64;
    check_flash_backward(c, head_dim, kTypes[head_dim / 16 % 2], 71, true, 1, kDevice);
  }
}

}  // namespace

int main() {
  gradients_equal_double_precision();
  steps_go_round_in_their_rings();
  check_flash_backward_in_every_order(kDevice);
  check_flash_backward_with_scales_of_any_kind(kDevice);
  return 0;
}
