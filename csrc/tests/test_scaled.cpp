// Weighted rows on every instruction set of this machine: each row and its gradients, and nothing
// beside them.

#include <random>
#include <vector>

#include "check.h"
#include "compaction/scaled.h"
#include "matrices.h"

namespace {

using namespace pruneops;
using pruneops::testing::Matrix;

// Rows 0, 3, 6, ... are kept, in reverse order.
void check_columns(const ScaledKernels& kernels, FloatType type, int64_t columns, int64_t padding) {
  constexpr int64_t kTotal = 10, kKept = 4;
  std::mt19937 random(3);
  Matrix x(type, kTotal, columns, padding), dout = x;
  Matrix residual(type, kKept, columns, padding), branch = residual;
  x.fill(random), dout.fill(random), residual.fill(random), branch.fill(random);
  std::vector<int32_t> source(kTotal, -1);
  for (int32_t i = 0; i < kKept; ++i) source[9 - 3 * i] = i;
  std::vector<float> weights(kTotal);
  for (float& w : weights) w = testing::some_value(random);

  Matrix out(type, kTotal, columns), expected = out;
  Matrix dx = out, expected_dx = out;
  Matrix dresidual(type, kKept, columns), dbranch = dresidual, expected_dresidual = dresidual,
                                          expected_dbranch = dresidual;
  std::vector<float> dweights(kTotal, -7.0f), expected_dweights(kTotal, 0.0f);
  for (int64_t t = 0; t < kTotal; ++t) {
    const int64_t i = source[t];
    for (int64_t c = 0; c < columns; ++c) {
      const float value = i >= 0 ? branch.at(i, c) : x.at(t, c), d = dout.at(t, c);
      const float scaled = weights[t] * value;
      testing::put_float(type, i >= 0 ? residual.at(i, c) + scaled : scaled, expected.data(),
                         t * columns + c);
      testing::put_float(type, i >= 0 ? 0.0f : weights[t] * d, expected_dx.data(), t * columns + c);
      expected_dweights[t] += value * d;
      if (i < 0) continue;
      testing::put_float(type, d, expected_dresidual.data(), i * columns + c);
      testing::put_float(type, weights[t] * d, expected_dbranch.data(), i * columns + c);
    }
  }

  const ScatterScaledParams p{x.view(),       residual.view(), branch.view(),
                              weights.data(), source.data(),   out.data(),
                              type,           kTotal,          columns};
  const ScatterScaledGradParams g{dout.view(),    x.view(),        branch.view(), weights.data(),
                                  source.data(),  nullptr,         dx.data(),     dresidual.data(),
                                  dbranch.data(), dweights.data(), type,          kTotal,
                                  kKept,          columns};
  for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, 4}, {4, kTotal}}) {
    kernels.forward(p, begin, end);
    kernels.backward(g, begin, end);
  }
  CHECK(out.same_bytes(expected));
  CHECK(dx.same_bytes(expected_dx));
  CHECK(dresidual.same_bytes(expected_dresidual) && dbranch.same_bytes(expected_dbranch));
  CHECK(dweights == expected_dweights);
}

}  // namespace

int main() {
  for (int isa = 0; isa <= static_cast<int>(best_isa()); ++isa) {
    if (!isa_compiled(static_cast<Isa>(isa))) continue;
    const ScaledKernels& kernels = scaled_kernels(static_cast<Isa>(isa));
    for (FloatType type : testing::kFloatTypes) {
      for (int64_t columns = 0; columns < 70; ++columns) {
        check_columns(kernels, type, columns, columns % 3);
      }
      check_columns(kernels, type, 1040, 0);
    }
  }
  return 0;
}
