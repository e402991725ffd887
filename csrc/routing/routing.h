// The weight of a row from a learned logit: the torch-free interface.

#pragma once

#include <cstdint>

#include "common/cpu_features.h"
#include "common/float_types.h"
#include "common/parallel.h"
#include "common/rows.h"

namespace pruneops {

enum class Activation : int32_t { kTanh, kSigmoid, kNone };

struct RouterParams {
  Rows x;                 // [total, columns], of `type`; not read where target is 0
  const void* weight;     // [columns], dense, of `type`
  float bias;             // 0 if there is none
  const uint8_t* target;  // [total], nonzero = routed; or null for all
  Activation activation;
  float scale;
  float shift;
  float* logits;   // [total], -inf where target is 0
  float* weights;  // [total], 1 where target is 0
  FloatType type;
  int64_t total;
  int64_t columns;
};

// logits[t] = x[t] . weight + bias, weights[t] = scale * activation(logits[t]) + shift.
void router_weights(const RouterParams& params, const ParallelFor& parallel);

struct RouterGradParams {
  const float* dweights;  // [total]
  const float* logits;    // [total], from the forward pass
  Rows x;                 // [total, columns], of `type`
  const void* weight;     // [columns], dense, of `type`
  const uint8_t* target;  // [total] or null, as above
  Activation activation;
  float scale;
  void* dx;         // [total, columns], dense, of `type`; 0 where target is 0
  void* dweight;    // [columns], of `type`
  void* dbias;      // [1], of `type`
  float* dlogits;   // scratch [total]
  float* partials;  // scratch [router_blocks(total), columns]
  FloatType type;
  int64_t total;
  int64_t columns;
};

// Rows are summed within blocks, then block by block. How long a block is depends on their number
// alone, so the sums do not depend on the number of threads.
int64_t router_blocks(int64_t total);

void router_weights_backward(const RouterGradParams& params, const ParallelFor& parallel);

// What one instruction set brings.
struct RouterKernels {
  // logits of rows [begin, end), without their bias.
  void (*dots)(const RouterParams& params, int64_t begin, int64_t end);
  // dx of rows [begin, end), and the sum over them of dlogits[t] * x[t].
  //   partial  [columns]
  void (*gradients)(const RouterGradParams& params, int64_t begin, int64_t end, float* partial);
};

const RouterKernels& router_kernels(Isa isa);

}  // namespace pruneops
