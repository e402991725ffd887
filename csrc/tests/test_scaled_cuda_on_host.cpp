// The CUDA kernels of weighted rows give what those of the CPU give, for any alignment and any
// indices, and write nothing else.

#include <climits>
#include <random>
#include <vector>

#include "check.h"
#include "compaction/compaction.h"
#include "compaction/cuda/scaled.cu"
#include "compaction/scaled.h"
#include "matrices.h"

namespace {

using namespace pruneops;
using pruneops::testing::Matrix;

struct Layout {
  int64_t columns;
  int64_t padding;
  int64_t shift;
};

// One problem with the outputs of both kernels.
struct Case {
  FloatType type;
  int64_t total, columns;
  std::vector<int32_t> indices;
  std::vector<int32_t> source;
  std::vector<float> weights;
  Matrix x, residual, branch, dout;

  Case(FloatType type, int64_t total, const Layout& layout, const std::vector<int32_t>& indices)
      : type(type),
        total(total),
        columns(layout.columns),
        indices(indices),
        source(total),
        weights(total),
        x(type, total, layout.columns, layout.padding, layout.shift),
        residual(type, kept(), layout.columns, layout.padding, layout.shift),
        branch(type, kept(), layout.columns, layout.padding, layout.shift),
        dout(type, total, layout.columns, layout.padding, layout.shift) {
    std::mt19937 random(7);
    x.fill(random), residual.fill(random), branch.fill(random), dout.fill(random);
    for (float& w : weights) w = testing::some_value(random);
    invert_indices(indices.data(), kept(), source.data(), total);
  }

  int64_t kept() const { return static_cast<int64_t>(indices.size()); }
};

void check_forward(const Case& c, int64_t shift, int num_sms) {
  Matrix ours(c.type, c.total, c.columns, 0, shift), expected = ours;
  const CudaScatterScaledParams p{c.x.view(),       c.residual.view(), c.branch.view(),
                                  c.weights.data(), c.indices.data(),  ours.data(),
                                  c.type,           c.total,           c.kept(),
                                  c.columns};
  CHECK(launch_scatter_scaled(p, num_sms, nullptr) == cudaSuccess);
  const ScatterScaledParams q{c.x.view(),       c.residual.view(), c.branch.view(),
                              c.weights.data(), c.source.data(),   expected.data(),
                              c.type,           c.total,           c.columns};
  scatter_scaled(q, testing::serial());
  CHECK(ours.same_bytes(expected));
}

struct Gradients {
  Matrix dx, dresidual, dbranch, dweights;
  Gradients(const Case& c, int64_t shift)
      : dx(c.type, c.total, c.columns, 0, shift),
        dresidual(c.type, c.kept(), c.columns, 0, shift),
        dbranch(c.type, c.kept(), c.columns, 0, shift),
        dweights(FloatType::kFloat32, 1, c.total) {}
};

void check_backward(const Case& c, int64_t shift, int num_sms) {
  Gradients ours(c, shift), expected(c, shift);
  const CudaScatterScaledGradParams p{c.dout.view(),
                                      c.x.view(),
                                      c.branch.view(),
                                      c.weights.data(),
                                      c.indices.data(),
                                      ours.dx.data(),
                                      ours.dresidual.data(),
                                      ours.dbranch.data(),
                                      static_cast<float*>(ours.dweights.data()),
                                      c.type,
                                      c.total,
                                      c.kept(),
                                      c.columns};
  CHECK(launch_scatter_scaled_backward(p, num_sms, nullptr) == cudaSuccess);
  const ScatterScaledGradParams q{c.dout.view(),
                                  c.x.view(),
                                  c.branch.view(),
                                  c.weights.data(),
                                  c.source.data(),
                                  c.indices.data(),
                                  expected.dx.data(),
                                  expected.dresidual.data(),
                                  expected.dbranch.data(),
                                  static_cast<float*>(expected.dweights.data()),
                                  c.type,
                                  c.total,
                                  c.kept(),
                                  c.columns};
  scatter_scaled_backward(q, testing::serial());
  CHECK(ours.dx.same_bytes(expected.dx));
  CHECK(ours.dresidual.same_bytes(expected.dresidual));
  CHECK(ours.dbranch.same_bytes(expected.dbranch));
  CHECK(ours.dweights.same_bytes(expected.dweights));
}

void check(FloatType type, int64_t total, const Layout& layout, const std::vector<int32_t>& indices,
           int num_sms = 132) {
  const Case c(type, total, layout, indices);
  check_forward(c, layout.shift, num_sms);
  check_backward(c, layout.shift, num_sms);
}

std::vector<int32_t> every(int64_t total, int64_t step) {
  std::vector<int32_t> indices;
  for (int64_t t = 0; t < total; t += step) indices.push_back(static_cast<int32_t>(t));
  return indices;
}

void check_layouts() {
  for (FloatType type : testing::kFloatTypes) {
    // Of 16 bytes, less, more than the lanes of a warp take at once, and odd.
    for (int64_t columns : {1, 7, 8, 40, 515, 1040}) {
      check(type, 11, {columns, 0, 0}, every(11, 3));
    }
    check(type, 11, {24, 8, 0}, every(11, 2));
    check(type, 11, {24, 3, 0}, every(11, 2));
    check(type, 11, {24, 0, 1}, every(11, 2));
    check(type, 11, {0, 0, 0}, every(11, 2));
  }
}

void check_indices() {
  const Layout layout{24, 0, 0};
  check(FloatType::kBFloat16, 20, layout, {});
  check(FloatType::kBFloat16, 20, layout, every(20, 1));
  check(FloatType::kBFloat16, 20, layout, {3, 5, 11, -1, -1, -1});
  check(FloatType::kBFloat16, 20, layout, {19, -1, 0, 7, 20, INT_MAX, INT_MIN, 4});
  check(FloatType::kBFloat16, 20, layout, {4, 9, 4, 4, 0, 9});
  check(FloatType::kBFloat16, 0, layout, {0, -1, 3});
  check(FloatType::kBFloat16, 0, layout, {});
}

// Tiles of more rows than warps, more indices than a block reads at once, more than one tile of
// indices.
void check_tiles() {
  std::vector<int32_t> many = every(1500, 1);
  std::mt19937 random(5);
  for (size_t i = many.size(); i > 1; --i) std::swap(many[i - 1], many[random() % i]);
  for (size_t i = 0; i < many.size(); i += 3) many[i] = -1;
  for (int num_sms : {1, 4, 132}) check(FloatType::kFloat32, 1500, {4, 0, 0}, many, num_sms);
}

}  // namespace

int main() {
  for (const cuda_on_host::Schedule& schedule : cuda_on_host::all_schedules()) {
    cuda_on_host::schedule = schedule;
    check_layouts();
    check_indices();
  }
  check_tiles();
  return 0;
}
