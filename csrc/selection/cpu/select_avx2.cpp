#define PRUNEOPS_ISA_NAMESPACE select_avx2
#include "selection/cpu/select_impl.h"

namespace pruneops {

SelectKernels select_kernels_avx2() { return select_avx2::kernels(); }

}  // namespace pruneops
