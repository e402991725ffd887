// Every tile choice of the flash kernels, with its reason.

#pragma once

#include <stdint.h>

namespace pruneops {

// Forward, sm_80 and newer: mma.sync by 4 warps, each with 32 packed rows.
//
// Two groups of 16 rows a warp, so that each fragment of keys and values is read from shared memory
// for two products: with one, shared memory is as busy as the tensor cores. 4 warps of at most 255
// registers let two blocks live on a multiprocessor, one working on its softmax while the other
// multiplies. 64 keys are 64 registers of scores beside head_dim of output; queries stay in
// registers where those allow it. A multiprocessor of 8.0 has 164 KiB of shared memory, one of 8.6,
// 8.9 and 12.x 100 KiB: two slots, the least there can be, let two blocks of up to 80 live on the
// latter too (32 and 40 KiB). Larger ones live alone there, so 96 takes what 8.0 has for two
// blocks, four slots (72 KiB), and 128 two (64 KiB).
//
// Policy attention has the same tiles. The 5 KiB that it keeps beside them, of what keys count and
// of largest scores, leave as many blocks on either.
struct ForwardTileSm80 {
  int rows;   // packed rows (query, head) of a block
  int keys;   // of a tile of keys or values
  int slots;  // tiles of keys or values in shared memory, being read or on their way
  bool queries_in_registers;
};

constexpr ForwardTileSm80 forward_tile_sm80(int head_dim) {
  if (head_dim <= 80) return {128, 64, 2, true};
  if (head_dim <= 96) return {128, 64, 4, false};
  return {128, 64, 2, false};
}

// Forward, sm_90a: wgmma by two or three consumer warpgroups with 64 packed rows each, one block a
// multiprocessor.
//
// A thread keeps keys / 2 registers of scores, keys / 4 of rounded probabilities and head_dim / 2
// of output at once, since the next scores are multiplied while the last values are. The softmax of
// short rows takes about as long as their products, so up to 96 there are three consumers: two can
// be at their softmax while the third multiplies. They have 152 registers a thread, two have 232,
// beside 40 of those that feed them. The most keys that fit are 56 + 28 + 32, 56 + 28 + 40 and
// 48 + 24 + 48 registers. At 128 that would be too few keys a tile, and two consumers suffice; 176
// keys would fit, but cost more at the diagonal than they save elsewhere. Three stages keep the
// copies a tile ahead of a consumer that falls behind.
struct ForwardTileSm90 {
  int rows;    // packed rows (query, head) of a block
  int keys;    // of a tile of keys or values
  int stages;  // tiles of keys, and as many of values, in shared memory
};

constexpr ForwardTileSm90 forward_tile_sm90(int head_dim) {
  if (head_dim <= 80) return {192, 112, 3};
  if (head_dim <= 96) return {192, 96, 3};
  return {128, 128, 3};
}

// Backward, sm_80 and newer: mma.sync by 4 warps, each with 16 keys (dk, dv) or 16 packed rows
// (dq).
//
// A warp keeps its sums in registers, head_dim of them for dk and dv and half of that for dq, next
// to `step` for P and dS: with 32 keys a warp there would be no room from head dim 80 on. Two
// blocks live on a multiprocessor, so a thread has up to 255 registers; what is left of them holds
// fragments of the held tiles, which otherwise are read from shared memory with each step. A step
// of 64 needs half as many barriers and reads of the held tiles as one of 32, and is taken where
// that fits. Shared memory, the held tiles and two steps, is 48 to 72 KiB: two blocks on 8.0 (164
// KiB), mostly one on 8.6, 8.9 and 12.x (100 KiB).
//
// Policy attention has the same tiles: what keys count and the sums for the policy take 4 registers
// more where keys are held, none where rows are.
struct BackwardTileSm80 {
  int held;                  // keys, or packed rows, of a block
  int step;                  // packed rows, or keys, that it goes through at a time
  bool first_in_registers;   // fragments of the held keys, or queries
  bool second_in_registers;  // of the held values, or gradients of the output
};

constexpr BackwardTileSm80 key_gradient_tile_sm80(int head_dim) {
  if (head_dim <= 64) return {64, 64, true, true};
  if (head_dim <= 80) return {64, 64, false, false};
  if (head_dim <= 96) return {64, 32, true, false};
  return {64, 32, false, false};
}

constexpr BackwardTileSm80 query_gradient_tile_sm80(int head_dim) {
  if (head_dim <= 80) return {64, 64, true, true};
  if (head_dim <= 96) return {64, 64, true, false};
  return {64, 32, true, true};
}

// Backward, sm_90a: wgmma by two consumer warpgroups with 64 keys (dk, dv) or 64 packed rows (dq)
// each, one block a multiprocessor. A thread has 240 registers. For keys it keeps head_dim of sums
// and step of scores and of products with values, rounded ones among them; for rows head_dim / 2
// and step. Rows arrive in three stages of 64, keys, whose tiles are twice as long, in two.
struct BackwardTileSm90 {
  int held;    // keys, or packed rows, of a block
  int step;    // rows of one head, or keys, that it goes through at a time
  int stages;  // of them in shared memory
};

constexpr BackwardTileSm90 kKeyGradientTileSm90 = {128, 64, 3};
constexpr BackwardTileSm90 kQueryGradientTileSm90 = {128, 128, 2};

}  // namespace pruneops
