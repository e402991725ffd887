#define PRUNEOPS_ISA_NAMESPACE select_avx512
#include "selection/cpu/select_impl.h"

namespace pruneops {

SelectKernels select_kernels_avx512() { return select_avx512::kernels(); }

}  // namespace pruneops
