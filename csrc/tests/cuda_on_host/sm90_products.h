// Stands in for the products of warpgroups (wgmma). Operands in shared memory are read where the
// bits of their descriptors say, when the product is asked for, and once more when it is waited
// for: they must not have changed. Until then the accumulators hold NaN, and must not be touched.

#pragma once

#include "common/sm90_operands.h"
#include "sm90_block.h"
#include "sm90_operand_bits.h"
#include "tensor_cores.h"

namespace cuda_on_host {

constexpr uint32_t kUnfinished = 0x7fc0dead;  // a NaN

inline OperandBits operand_bits(uint64_t bits) {
  const OperandBits operand(bits);
  if (!operand.only_known) Block::current().fail("an operand is named with bits not used here");
  if (operand.swizzle == 0) Block::current().fail("an operand without a swizzle");
  return operand;
}

// What one lane brings to a product.
struct WarpgroupProduct {
  float* d;
  int columns;
  uint64_t a;
  const uint32_t* a_registers;  // or null: a is in shared memory
  uint64_t b;
  bool transposed;
  bool accumulate;
};

inline uint64_t mixed(uint64_t sum, uint64_t x) { return (sum ^ x) * 0x100000001b3u; }

inline uint64_t checksum(const PendingOperand& operand) {
  const OperandBits bits = operand_bits(operand.descriptor);
  uint64_t sum = 0;
  for (int row = 0; row < operand.rows; ++row) {
    for (int k = 0; k < 16; ++k) {
      const size_t at = bits.address(operand.first_row + row, k, operand.transposed);
      sum = mixed(sum, sm90_block.read(at));
    }
  }
  return sum;
}

// The bits of d[i], and whether they still are as a product left them.
inline void check_untouched(const PendingFragment& fragment) {
  for (int i = 0; i < fragment.count; ++i) {
    if (pruneops::bits_of_float(fragment.d[i]) != kUnfinished) {
      Block::current().fail("an accumulator was written before its products were finished");
    }
  }
}

template <bool kBFloat16>
void multiply_in_warp(const std::array<WarpgroupProduct*, 32>& lanes) {
  Block& block = Block::current();
  const WarpgroupProduct& first = *lanes[0];
  for (const WarpgroupProduct* lane : lanes) {
    if (lane->a != first.a || lane->b != first.b || lane->accumulate != first.accumulate) {
      block.fail("the lanes of a warp multiply different operands");
    }
  }
  sm90_block.step("a product", mixed(mixed(mixed(first.a, first.b), first.accumulate * 2),
                                     static_cast<uint64_t>(first.columns)));
  WarpProducts& warp = sm90_block.warp();
  if (!warp.fenced) block.fail("a product without fence_products() before its batch");
  ++warp.products;
  const int slice = block.thread() / 32 % 4 * 16, columns = first.columns;

  static double a[16][16], b[16][256], sums[16][256];
  PendingOperand of_b{first.b, columns, 0, first.transposed, warp.batches, 0};
  const OperandBits bits_of_b = operand_bits(first.b);
  for (int row = 0; row < columns; ++row) {
    for (int k = 0; k < 16; ++k) {
      const uint16_t bits = sm90_block.read(bits_of_b.address(row, k, first.transposed));
      of_b.checksum = mixed(of_b.checksum, bits);
      b[k][row] = element<kBFloat16>(bits);
    }
  }
  warp.operands.push_back(of_b);
  if (first.a_registers == nullptr) {
    PendingOperand of_a{first.a, 16, slice, false, warp.batches, 0};
    const OperandBits bits_of_a = operand_bits(first.a);
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 16; ++k) {
        const uint16_t bits = sm90_block.read(bits_of_a.address(slice + row, k, false));
        of_a.checksum = mixed(of_a.checksum, bits);
        a[row][k] = element<kBFloat16>(bits);
      }
    }
    warp.operands.push_back(of_a);
  } else {
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 16; ++k) {
        const uint32_t word = lanes[row % 8 * 4 + k % 8 / 2]->a_registers[row / 8 + k / 8 * 2];
        a[row][k] = element<kBFloat16>(static_cast<uint16_t>(k % 2 == 0 ? word : word >> 16));
      }
    }
  }

  // The accumulators as they are now, which may be the results of products still under way.
  PendingFragment* fragments[32];
  for (int lane = 0; lane < 32; ++lane) {
    float* d = lanes[lane]->d;
    std::vector<PendingFragment>& pending = warp.fragments[lane];
    PendingFragment* fragment = nullptr;
    for (PendingFragment& other : pending) {
      if (other.d == d) {
        fragment = &other;
        continue;
      }
      if (other.d < d + columns / 2 && d < other.d + other.count) {
        block.fail("accumulators of products overlap");
      }
    }
    if (fragment == nullptr) {
      pending.push_back({d, columns / 2, 0, {}});
      fragment = &pending.back();
      std::memcpy(fragment->values.data(), d, sizeof(float) * columns / 2);
    } else {
      check_untouched(*fragment);
    }
    if (fragment->count != columns / 2) block.fail("accumulators of products overlap");
    fragment->batch = warp.batches;
    fragments[lane] = fragment;
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < columns / 2; ++i) {
      const int row = pruneops::fragment_row(lane, i), column = pruneops::fragment_column(lane, i);
      sums[row][column] = first.accumulate ? double{fragments[lane]->values[i]} : 0.0;
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      const double x = a[row][k];
      for (int column = 0; column < columns; ++column) sums[row][column] += x * b[k][column];
    }
  }
  const float unfinished = pruneops::float_from_bits(kUnfinished);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < columns / 2; ++i) {
      const int row = pruneops::fragment_row(lane, i), column = pruneops::fragment_column(lane, i);
      fragments[lane]->values[i] = cut_off(sums[row][column]);
      std::memcpy(&lanes[lane]->d[i], &unfinished, sizeof(float));
    }
  }
}

// See multiply() in common/sm90_mma.cuh.
template <bool kBFloat16>
void multiply_warpgroup(float* d, int columns, uint64_t a, const uint32_t* a_registers, uint64_t b,
                        bool transposed, bool accumulate) {
  WarpgroupProduct mine{d, columns, a, a_registers, b, transposed, accumulate};
  Block::current().together<WarpgroupProduct>("a product of the warpgroup", mine,
                                              multiply_in_warp<kBFloat16>);
}

inline void fence_products() {
  int nothing = 0;
  Block::current().together<int>("fence_products", nothing, [](const std::array<int*, 32>&) {
    sm90_block.step("fence_products", 0);
    sm90_block.warp().fenced = true;
  });
}

inline void commit_products() {
  int nothing = 0;
  Block::current().together<int>("commit_products", nothing, [](const std::array<int*, 32>&) {
    sm90_block.step("commit_products", 0);
    WarpProducts& warp = sm90_block.warp();
    warp.fenced = false;
    warp.products = 0;
    ++warp.batches;
  });
}

inline void wait_for_products(int still_pending) {
  // All others get a turn before: who overwrites an operand that was given back too early does so.
  int asked = 0;
  Block::current().wait_until("wait_for_products", [&asked] { return ++asked > 1; });
  int mine = still_pending;
  Block::current().together<int>("wait_for_products", mine, [](const std::array<int*, 32>& lanes) {
    sm90_block.step("wait_for_products", static_cast<uint64_t>(*lanes[0]));
    WarpProducts& warp = sm90_block.warp();
    const int done = warp.batches - *lanes[0];  // batches below this one
    std::vector<PendingOperand> operands;
    for (const PendingOperand& operand : warp.operands) {
      if (operand.batch >= done) {
        operands.push_back(operand);
      } else if (checksum(operand) != operand.checksum) {
        Block::current().fail("shared memory changed while a product might still read it");
      }
    }
    warp.operands = operands;
    for (std::vector<PendingFragment>& fragments : warp.fragments) {
      size_t kept = 0;
      for (size_t i = 0; i < fragments.size(); ++i) {
        if (fragments[i].batch >= done) {
          if (kept != i) fragments[kept] = fragments[i];
          ++kept;
          continue;
        }
        check_untouched(fragments[i]);
        std::memcpy(fragments[i].d, fragments[i].values.data(), sizeof(float) * fragments[i].count);
      }
      fragments.resize(kept);
    }
  });
}

// After a wait: nothing still writes to this fragment.
template <class T, int kCount>
void check_finished(const T (&d)[kCount]) {
  const Block& block = Block::current();
  for (const PendingFragment& fragment : sm90_block.warp().fragments[block.lane()]) {
    if (static_cast<const void*>(fragment.d) == d) {
      Block::current().fail("wait_for_products() names a fragment whose products are not finished");
    }
  }
}

}  // namespace cuda_on_host
