// Picks the kernel table of an instruction set among those that were compiled.

#include "clustering/clustering.h"

namespace pruneops {

namespace scalar {
extern const ClusterKernels kClusterKernels;
}
#if defined(PRUNEOPS_HAVE_AVX2)
namespace avx2 {
extern const ClusterKernels kClusterKernels;
}
#endif
#if defined(PRUNEOPS_HAVE_AVX512)
namespace avx512 {
extern const ClusterKernels kClusterKernels;
}
#endif

const ClusterKernels& cluster_kernels(Isa isa) {
  switch (isa) {
#if defined(PRUNEOPS_HAVE_AVX512)
    case Isa::kAvx512Bf16:
    case Isa::kAvx512:
      return avx512::kClusterKernels;
#endif
#if defined(PRUNEOPS_HAVE_AVX2)
    case Isa::kAvx2:
      return avx2::kClusterKernels;
#endif
    default:
      return scalar::kClusterKernels;
  }
}

}  // namespace pruneops
