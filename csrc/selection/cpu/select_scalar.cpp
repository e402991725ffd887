#define PRUNEOPS_ISA_NAMESPACE select_scalar
#include "selection/cpu/select_impl.h"

namespace pruneops {

SelectKernels select_kernels_scalar() { return select_scalar::kernels(); }

}  // namespace pruneops
