#include "check.h"
#include "common/cpu_features.h"

int main() {
  using pruneops::Isa;
  CHECK(pruneops::isa_compiled(Isa::kScalar));
  CHECK(pruneops::isa_compiled(pruneops::best_isa()));
  CHECK(static_cast<int>(pruneops::active_isa()) <= static_cast<int>(pruneops::best_isa()));
  return 0;
}
