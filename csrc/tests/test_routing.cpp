// The router on every instruction set of this machine: dot products, gradients and their sums, and
// nothing beside them.

#include <cmath>
#include <random>
#include <utility>
#include <vector>

#include "check.h"
#include "matrices.h"
#include "routing/routing.h"

namespace {

using namespace pruneops;
using pruneops::testing::Matrix;

// Every third row is not routed and holds NaN.
void check_columns(const RouterKernels& kernels, FloatType type, int64_t columns, int64_t padding) {
  constexpr int64_t kTotal = 11;
  std::mt19937 random(3);
  Matrix x(type, kTotal, columns, padding), weight(type, 1, columns);
  x.fill(random), weight.fill(random);
  std::vector<uint8_t> target(kTotal);
  std::vector<float> dlogits(kTotal), logits(kTotal, -7.0f), expected_logits = logits;
  Matrix dx(type, kTotal, columns), expected_dx = dx;
  Matrix sums(FloatType::kFloat32, 1, columns), expected_sums = sums;
  std::vector<float> added(columns, 0.0f);
  for (int64_t t = 0; t < kTotal; ++t) {
    target[t] = t % 3 != 0;
    dlogits[t] = target[t] ? testing::some_value(random) : 0.0f;
    if (target[t]) expected_logits[t] = 0.0f;
    for (int64_t c = 0; c < columns; ++c) {
      testing::put_float(type, dlogits[t] * weight.at(0, c), expected_dx.data(), t * columns + c);
      if (!target[t]) {
        testing::put_float(type, 0.0f, expected_dx.data(), t * columns + c);
        testing::put_float(type, NAN, x.data(), t * x.stride() + c);
        continue;
      }
      expected_logits[t] += x.at(t, c) * weight.at(0, c);
      added[c] += dlogits[t] * x.at(t, c);
    }
  }
  for (int64_t c = 0; c < columns; ++c) {
    testing::put_float(FloatType::kFloat32, added[c], expected_sums.data(), c);
  }

  RouterParams p{};
  p.x = x.view();
  p.weight = weight.data();
  p.target = target.data();
  p.logits = logits.data();
  p.type = type;
  p.total = kTotal;
  p.columns = columns;
  kernels.dots(p, 0, 5);
  kernels.dots(p, 5, kTotal);
  CHECK(logits == expected_logits);

  RouterGradParams g{};
  g.x = x.view();
  g.weight = weight.data();
  g.target = target.data();
  g.dx = dx.data();
  g.dlogits = dlogits.data();
  g.type = type;
  g.total = kTotal;
  g.columns = columns;
  kernels.gradients(g, 0, kTotal, static_cast<float*>(sums.data()));
  CHECK(dx.same_bytes(expected_dx));
  CHECK(sums.same_bytes(expected_sums));
}

// The order of summation depends on the number of rows alone, not on who adds which.
void check_threads(int64_t total) {
  constexpr int64_t kColumns = 600;
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<float> x(total * kColumns), weight(kColumns), dweights(total), logits(total);
  for (auto* values : {&x, &weight, &dweights, &logits}) {
    for (float& value : *values) value = normal(random);
  }
  std::vector<std::vector<float>> results;
  for (const ParallelFor& parallel : {testing::serial(), testing::two_threads()}) {
    std::vector<float> dx(total * kColumns), dweight(kColumns), dbias(1), dlogits(total);
    std::vector<float> partials(router_blocks(total) * kColumns);
    RouterGradParams g{};
    g.dweights = dweights.data();
    g.logits = logits.data();
    g.x = {x.data(), kColumns};
    g.weight = weight.data();
    g.activation = Activation::kTanh;
    g.scale = 0.2f;
    g.dx = dx.data();
    g.dweight = dweight.data();
    g.dbias = dbias.data();
    g.dlogits = dlogits.data();
    g.partials = partials.data();
    g.type = FloatType::kFloat32;
    g.total = total;
    g.columns = kColumns;
    router_weights_backward(g, parallel);
    dweight.push_back(dbias[0]);
    results.push_back(std::move(dweight));
  }
  CHECK(results[0] == results[1]);
}

}  // namespace

int main() {
  for (int isa = 0; isa <= static_cast<int>(best_isa()); ++isa) {
    if (!isa_compiled(static_cast<Isa>(isa))) continue;
    const RouterKernels& kernels = router_kernels(static_cast<Isa>(isa));
    for (FloatType type : testing::kFloatTypes) {
      for (int64_t columns = 0; columns < 70; ++columns) {
        check_columns(kernels, type, columns, columns % 3);
      }
      check_columns(kernels, type, 1040, 0);
    }
  }
  for (int64_t total : {0, 1, 33, 500}) check_threads(total);
  return 0;
}
