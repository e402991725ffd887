// The forward pass with mma.sync, run on the CPU, against attention in double precision: ragged
// segments, every head dim and dtype, head groups, limits, slots, NaN wherever nothing may be read,
// in several orders of threads and blocks.

#include "attention/cuda/flash_forward.cu"
#include "attention/cuda/flash_forward_sm80_hd128.cu"
#include "attention/cuda/flash_forward_sm80_hd64.cu"
#include "attention/cuda/flash_forward_sm80_hd80.cu"
#include "attention/cuda/flash_forward_sm80_hd96.cu"
#include "attention/cuda/flash_schedule.cu"
#include "flash_forward_case.h"

namespace {

using namespace pruneops::testing;
using pruneops::FloatType;

constexpr pruneops::FlashDevice kDevice = {108, 80, 163 << 10};
constexpr FloatType kTypes[] = {FloatType::kBFloat16, FloatType::kFloat16};

void every_case_in_every_kernel() {
  std::vector<FlashCase> cases = flash_cases();
  for (const FlashCase& c : flash_slot_cases()) cases.push_back(c);
  unsigned seed = 1;
  for (const FlashCase& c : cases) {
    for (int64_t head_dim : {64, 80, 96, 128}) {
      // Two orders at a time, all of them in turn.
      for (FloatType type : kTypes) {
        check_flash_forward(c, head_dim, type, seed, kDevice, {seed % 6, (seed / 6 + 3) % 6});
        ++seed;
      }
    }
  }
}

// Every key that is seen counts the same, and -inf times 0 is nowhere.
void scale_may_be_zero() {
  FlashInputs in(flash_cases()[3], 64, FloatType::kBFloat16, 3);
  in.scale = 0.0f;
  const FlashResults exact = attend<double>(in, false), plain = attend<float>(in, false);
  const FlashOutput output = run_flash_forward(in, kDevice);
  check_errors("scale 0", output.out.values(), exact.out, plain.out, 2.0, in.type);
  check_lse("scale 0", output.lse, exact.lse);
}

void refuses_what_it_cannot_read() {
  FlashInputs in(flash_cases()[0], 64, FloatType::kBFloat16, 3);
  CHECK(pruneops::flash_reads(in.q.view()));
  pruneops::RowView view = in.q.view();
  view.row_stride += 1;
  CHECK(!pruneops::flash_reads(view));
  view.row_stride = int64_t{1} << 31;
  CHECK(!pruneops::flash_reads(view));
  view = in.q.view();
  view.data = in.q.bits.data() + 1;
  CHECK(!pruneops::flash_reads(view));
  CHECK(!pruneops::flash_supports(FloatType::kFloat32, 64));
  CHECK(!pruneops::flash_supports(FloatType::kFloat16, 72));
}

}  // namespace

int main() {
  every_case_in_every_kernel();
  check_flash_forward(many_segments(150, 12, 9), 80, FloatType::kFloat16, 9, kDevice, {0, 3});
  scale_may_be_zero();
  refuses_what_it_cannot_read();
  return 0;
}
