// Putting computed rows back among skipped ones, every row with its weight: the torch-free
// interface.

#pragma once

#include <cstdint>

#include "common/cpu_features.h"
#include "common/float_types.h"
#include "common/parallel.h"
#include "common/rows.h"

namespace pruneops {

struct ScatterScaledParams {
  Rows x;                 // [total, columns], of `type`; not read where source >= 0
  Rows residual;          // [kept, columns], of `type`
  Rows branch;            // [kept, columns], of `type`
  const float* weights;   // [total]
  const int32_t* source;  // [total], the row of residual and branch that comes here, or -1
  void* out;              // [total, columns], dense, of `type`
  FloatType type;
  int64_t total;
  int64_t columns;
};

// out[t] = residual[i] + weights[t] * branch[i] where i = source[t] >= 0, else weights[t] * x[t].
void scatter_scaled(const ScatterScaledParams& params, const ParallelFor& parallel);

struct ScatterScaledGradParams {
  Rows dout;               // [total, columns], of `type`
  Rows x;                  // [total, columns], of `type`
  Rows branch;             // [kept, columns], of `type`
  const float* weights;    // [total]
  const int32_t* source;   // [total], as above
  const int32_t* indices;  // [kept], what source is the inverse of
  void* dx;                // [total, columns], dense, of `type`
  void* dresidual;         // [kept, columns], dense, of `type`
  void* dbranch;           // [kept, columns], dense, of `type`
  float* dweights;         // [total]
  FloatType type;
  int64_t total;
  int64_t kept;
  int64_t columns;
};

// The gradients of the above. Rows that the forward pass did not read get 0.
void scatter_scaled_backward(const ScatterScaledGradParams& params, const ParallelFor& parallel);

// What one instruction set brings: rows [begin, end) of out, and what flows back from them.
struct ScaledKernels {
  void (*forward)(const ScatterScaledParams& params, int64_t begin, int64_t end);
  void (*backward)(const ScatterScaledGradParams& params, int64_t begin, int64_t end);
};

const ScaledKernels& scaled_kernels(Isa isa);

}  // namespace pruneops
