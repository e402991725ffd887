// The forward pass of Hopper, run on the CPU: its warps hand work, queries, keys and values to one
// another in several orders of threads and of arriving copies.

#define PRUNEOPS_WITH_SM90

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
#include "flash_forward_case.h"

namespace {

using namespace pruneops::testing;
using pruneops::FloatType;

// Few multiprocessors, so that each block gets several items.
constexpr pruneops::FlashDevice kDevice = {3, 90, 227 << 10};
constexpr int64_t kHeadDims[] = {64, 80, 96, 128};
constexpr FloatType kTypes[] = {FloatType::kBFloat16, FloatType::kFloat16};

unsigned seed = 0;

// In two orders at a time, all of them in turn.
void check(const FlashCase& c, int64_t head_dim, FloatType type) {
  ++seed;
  check_flash_forward(c, head_dim, type, seed, kDevice, {seed % 6, (seed / 6 + 3) % 6});
}

void every_case_in_every_kernel() {
  for (int64_t head_dim : kHeadDims) {
    for (FloatType type : kTypes) {
      for (const FlashCase& c : flash_cases()) check(c, head_dim, type);
    }
    for (const FlashCase& c : flash_slot_cases()) check(c, head_dim, kTypes[seed % 2]);
  }
}

// Tiles begin and end in the middle of a group.
void seven_heads_share_keys() {
  FlashCase c{"7 heads a key head", {0, 40, 41}, {0, 129, 140}, 41, 140, 7, 1};
  for (int64_t head_dim : kHeadDims) {
    check(c, head_dim, kTypes[seed % 2]);
    c.with_limit = !c.with_limit;
  }
}

// More tiles of keys than fit in shared memory at once, all consumers with rows and some without.
void keys_go_round_in_their_ring() {
  FlashCase c{"long", {0, 150, 400}, {0, 700, 1100}, 400, 1100, 1, 1};
  for (int64_t head_dim : kHeadDims) {
    c.causal = !c.causal;
    check(c, head_dim, kTypes[seed % 2]);
  }
  c.name = "long, kv_limit";
  c.with_limit = true;
  check(c, 64, FloatType::kBFloat16);
}

void segments_may_be_many() {
  check(many_segments(140, 9, 5), 64, FloatType::kFloat16);
  check(many_segments(140, 9, 6), 128, FloatType::kBFloat16);
}

}  // namespace

int main() {
  every_case_in_every_kernel();
  seven_heads_share_keys();
  keys_go_round_in_their_ring();
  segments_may_be_many();
  return 0;
}
