// The CUDA kernels of the router give what those of the CPU give, for any alignment, and write
// nothing else.

#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "matrices.h"
#include "routing/cuda/router.cu"
#include "routing/routing.h"

namespace {

using namespace pruneops;
using pruneops::testing::Matrix;

constexpr float kScale = 0.25f, kShift = 1.0f;

struct Layout {
  int64_t columns;
  int64_t padding;
  int64_t shift;
};

struct Case {
  FloatType type;
  Activation activation;
  int64_t total, columns;
  Matrix x, weight, bias, dweights;
  std::vector<uint8_t> target;  // empty: all rows

  // Rows that are not routed hold NaN.
  Case(FloatType type, Activation activation, int64_t total, const Layout& layout, bool masked)
      : type(type),
        activation(activation),
        total(total),
        columns(layout.columns),
        x(type, total, layout.columns, layout.padding, layout.shift),
        weight(type, 1, layout.columns, 0, layout.shift),
        bias(type, 1, 1),
        dweights(FloatType::kFloat32, 1, total) {
    std::mt19937 random(7);
    x.fill(random), weight.fill(random), bias.fill(random), dweights.fill(random);
    if (!masked) return;
    for (int64_t t = 0; t < total; ++t) {
      target.push_back(random() % 3 != 0);
      for (int64_t c = 0; c < columns && target[t] == 0; ++c) {
        testing::put_float(type, NAN, x.data(), t * x.stride() + c);
      }
    }
  }

  const uint8_t* mask() const { return target.empty() ? nullptr : target.data(); }
};

// Results of both kernels differ by roundings of float only; those of 16 bits may then round apart.
bool close(FloatType type, float ours, float expected, float size) {
  if (ours == expected || (std::isnan(ours) && std::isnan(expected))) return true;
  const float eps = type == FloatType::kFloat32   ? 0x1p-20f
                    : type == FloatType::kFloat16 ? 0x1p-10f
                                                  : 0x1p-7f;
  return std::fabs(ours - expected) <= eps * (std::fabs(expected) + size * 0x1p-10f);
}

void check_close(const Matrix& ours, const Matrix& expected, float size = 1.0f) {
  for (int64_t r = 0; r < ours.rows; ++r) {
    for (int64_t c = 0; c < ours.columns; ++c) {
      CHECK(!std::isnan(ours.at(r, c)));
      CHECK(close(ours.type, ours.at(r, c), expected.at(r, c), size));
    }
  }
}

void check(FloatType type, Activation activation, int64_t total, const Layout& layout, bool masked,
           bool biased) {
  const Case c(type, activation, total, layout, masked);
  Matrix logits(FloatType::kFloat32, 1, total), weights = logits;
  CudaRouterParams p{c.x.view(),
                     c.weight.data(),
                     biased ? c.bias.data() : nullptr,
                     c.mask(),
                     activation,
                     kScale,
                     kShift,
                     static_cast<float*>(logits.data()),
                     static_cast<float*>(weights.data()),
                     type,
                     total,
                     c.columns};
  CHECK(launch_router_weights(p, nullptr) == cudaSuccess);
  Matrix cpu_logits(FloatType::kFloat32, 1, total), cpu_weights = cpu_logits;
  RouterParams q{c.x.view(),
                 c.weight.data(),
                 biased ? c.bias.at(0, 0) : 0.0f,
                 c.mask(),
                 activation,
                 kScale,
                 kShift,
                 static_cast<float*>(cpu_logits.data()),
                 static_cast<float*>(cpu_weights.data()),
                 type,
                 total,
                 c.columns};
  router_weights(q, testing::serial());
  CHECK(logits.same_bytes(cpu_logits));
  check_close(weights, cpu_weights);
  for (int64_t t = 0; t < total; ++t) {
    if (masked && c.target[t] == 0) CHECK(logits.at(0, t) == -INFINITY && weights.at(0, t) == 1.0f);
  }

  std::vector<float> partials(router_partials(total, c.columns) + 4);
  Matrix dx(type, total, c.columns, 0, layout.shift), dweight(type, 1, c.columns),
      dbias(type, 1, 1);
  const uintptr_t address = (reinterpret_cast<uintptr_t>(partials.data()) + 15) / 16 * 16;
  CudaRouterGradParams g{static_cast<const float*>(c.dweights.data()),
                         static_cast<const float*>(logits.data()),
                         c.x.view(),
                         c.weight.data(),
                         c.mask(),
                         activation,
                         kScale,
                         dx.data(),
                         dweight.data(),
                         dbias.data(),
                         reinterpret_cast<float*>(address),
                         type,
                         total,
                         c.columns};
  CHECK(launch_router_weights_backward(g, nullptr) == cudaSuccess);
  std::vector<float> dlogits(total), cpu_partials(router_blocks(total) * c.columns);
  Matrix cpu_dx(type, total, c.columns, 0, layout.shift), cpu_dweight(type, 1, c.columns),
      cpu_dbias(type, 1, 1);
  RouterGradParams h{static_cast<const float*>(c.dweights.data()),
                     static_cast<const float*>(logits.data()),
                     c.x.view(),
                     c.weight.data(),
                     c.mask(),
                     activation,
                     kScale,
                     cpu_dx.data(),
                     cpu_dweight.data(),
                     cpu_dbias.data(),
                     dlogits.data(),
                     cpu_partials.data(),
                     type,
                     total,
                     c.columns};
  router_weights_backward(h, testing::serial());
  const float size = std::sqrt(static_cast<float>(total) + 1.0f);
  if (activation == Activation::kNone) {
    // All sums are exact.
    CHECK(dx.same_bytes(cpu_dx) && dweight.same_bytes(cpu_dweight) && dbias.same_bytes(cpu_dbias));
  }
  check_close(dx, cpu_dx);
  check_close(dweight, cpu_dweight, size);
  check_close(dbias, cpu_dbias, size);
  for (int64_t t = 0; t < total && masked; ++t) {
    for (int64_t column = 0; column < c.columns && c.target[t] == 0; ++column) {
      CHECK(dx.at(t, column) == 0.0f);
    }
  }
}

void check_layouts() {
  for (FloatType type : testing::kFloatTypes) {
    for (int64_t columns : {0, 1, 8, 24, 515}) {
      check(type, Activation::kTanh, 19, {columns, 0, 0}, true, true);
    }
    check(type, Activation::kSigmoid, 19, {24, 8, 0}, false, false);
    check(type, Activation::kNone, 19, {24, 3, 0}, true, true);
    check(type, Activation::kNone, 19, {24, 0, 1}, true, true);
    // The rows of x begin on 16 bytes, those of dx do not.
    check(type, Activation::kNone, 5, {23, 1, 0}, false, true);
  }
  check(FloatType::kBFloat16, Activation::kTanh, 0, {24, 0, 0}, false, true);
}

}  // namespace

int main() {
  for (const cuda_on_host::Schedule& schedule : cuda_on_host::all_schedules()) {
    cuda_on_host::schedule = schedule;
    check_layouts();
  }
  // More than one slice of columns, more than one block of rows, more rows of a block than are
  // staged at once.
  check(FloatType::kBFloat16, Activation::kTanh, 40, {2064, 0, 0}, true, true);
  check(FloatType::kFloat32, Activation::kNone, 40, {1028, 0, 0}, true, true);
  check(FloatType::kFloat32, Activation::kNone, 66000, {4, 0, 0}, true, true);
  return 0;
}
