// The router: the choice of an instruction set, activations, and the loops over rows.

#include "routing/routing.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace pruneops {

namespace scalar {
extern const RouterKernels kRouterKernels;
}
#if defined(PRUNEOPS_HAVE_AVX2)
namespace avx2 {
extern const RouterKernels kRouterKernels;
}
#endif
#if defined(PRUNEOPS_HAVE_AVX512)
namespace avx512 {
extern const RouterKernels kRouterKernels;
}
#endif
#if defined(PRUNEOPS_HAVE_AVX512BF16)
namespace avx512bf16 {
extern const RouterKernels kRouterKernels;
}
#endif

const RouterKernels& router_kernels(Isa isa) {
  switch (isa) {
#if defined(PRUNEOPS_HAVE_AVX512BF16)
    case Isa::kAvx512Bf16:
      return avx512bf16::kRouterKernels;
#endif
#if defined(PRUNEOPS_HAVE_AVX512)
    case Isa::kAvx512:
      return avx512::kRouterKernels;
#endif
#if defined(PRUNEOPS_HAVE_AVX2)
    case Isa::kAvx2:
      return avx2::kRouterKernels;
#endif
    default:
      return scalar::kRouterKernels;
  }
}

namespace {

// Below this much data a second thread costs more than it brings.
constexpr int64_t kBytesPerTask = 64 * 1024;

int64_t grain(FloatType type, int64_t columns) {
  return std::max<int64_t>(1, kBytesPerTask / (columns * element_size(type) + 1));
}

constexpr int64_t kBlockRows = 32;  // or more, so that there are at most kMaxBlocks
constexpr int64_t kMaxBlocks = 128;

int64_t rows_per_block(int64_t total) {
  return std::max(kBlockRows, (total + kMaxBlocks - 1) / kMaxBlocks);
}

bool routed(const uint8_t* target, int64_t row) { return target == nullptr || target[row] != 0; }

float activate(Activation activation, float logit) {
  switch (activation) {
    case Activation::kTanh:
      return std::tanh(logit);
    case Activation::kSigmoid:
      return 1.0f / (1.0f + std::exp(-logit));
    default:
      return logit;
  }
}

float slope(Activation activation, float logit) {
  const float value = activate(activation, logit);
  switch (activation) {
    case Activation::kTanh:
      return (1.0f - value) * (1.0f + value);
    case Activation::kSigmoid:
      return value * (1.0f - value);
    default:
      return 1.0f;
  }
}

void put(FloatType type, float value, void* out, int64_t at) {
  switch (type) {
    case FloatType::kBFloat16:
      return from_float(value, static_cast<BFloat16*>(out) + at);
    case FloatType::kFloat16:
      return from_float(value, static_cast<Half*>(out) + at);
    default:
      static_cast<float*>(out)[at] = value;
  }
}

}  // namespace

void router_weights(const RouterParams& p, const ParallelFor& parallel) {
  const RouterKernels& kernels = router_kernels(active_isa());
  parallel_for(parallel, 0, p.total, grain(p.type, p.columns), [&](int64_t begin, int64_t end) {
    // Without columns, x may have no address.
    std::fill(p.logits + begin, p.logits + end, 0.0f);
    if (p.columns > 0) kernels.dots(p, begin, end);
    for (int64_t t = begin; t < end; ++t) {
      if (routed(p.target, t)) {
        p.logits[t] += p.bias;
        p.weights[t] = p.scale * activate(p.activation, p.logits[t]) + p.shift;
      } else {
        p.logits[t] = -std::numeric_limits<float>::infinity();
        p.weights[t] = 1.0f;
      }
    }
  });
}

int64_t router_blocks(int64_t total) {
  const int64_t rows = rows_per_block(total);
  return (total + rows - 1) / rows;
}

void router_weights_backward(const RouterGradParams& p, const ParallelFor& parallel) {
  const RouterKernels& kernels = router_kernels(active_isa());
  const int64_t blocks = router_blocks(p.total);
  const int64_t rows = rows_per_block(p.total);
  parallel_for(parallel, 0, blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * rows, end = std::min(begin + rows, p.total);
      for (int64_t t = begin; t < end; ++t) {
        const bool counts = routed(p.target, t);
        p.dlogits[t] = counts ? p.dweights[t] * p.scale * slope(p.activation, p.logits[t]) : 0.0f;
      }
      if (p.columns > 0) kernels.gradients(p, begin, end, p.partials + block * p.columns);
    }
  });
  constexpr int64_t kColumnsPerTask = 512;
  parallel_for(parallel, 0, p.columns, kColumnsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t block = 1; block < blocks; ++block) {
      const float* partial = p.partials + block * p.columns;
      for (int64_t c = begin; c < end; ++c) p.partials[c] += partial[c];
    }
    for (int64_t c = begin; c < end; ++c)
      put(p.type, blocks > 0 ? p.partials[c] : 0.0f, p.dweight, c);
  });
  double sum = 0.0;
  for (int64_t t = 0; t < p.total; ++t) sum += p.dlogits[t];
  put(p.type, static_cast<float>(sum), p.dbias, 0);
}

}  // namespace pruneops
