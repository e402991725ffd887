// Picks the kernel table of an instruction set among those that were compiled.

#include "attention/attention.h"

namespace pruneops {

namespace scalar {
extern const AttentionKernels kAttentionKernels;
}
#if defined(PRUNEOPS_HAVE_AVX2)
namespace avx2 {
extern const AttentionKernels kAttentionKernels;
}
#endif
#if defined(PRUNEOPS_HAVE_AVX512)
namespace avx512 {
extern const AttentionKernels kAttentionKernels;
}
#endif
#if defined(PRUNEOPS_HAVE_AVX512BF16)
namespace avx512bf16 {
extern const AttentionKernels kAttentionKernels;
}
#endif

const AttentionKernels& attention_kernels(Isa isa) {
  switch (isa) {
#if defined(PRUNEOPS_HAVE_AVX512BF16)
    case Isa::kAvx512Bf16:
      return avx512bf16::kAttentionKernels;
#endif
#if defined(PRUNEOPS_HAVE_AVX512)
    case Isa::kAvx512:
      return avx512::kAttentionKernels;
#endif
#if defined(PRUNEOPS_HAVE_AVX2)
    case Isa::kAvx2:
      return avx2::kAttentionKernels;
#endif
    default:
      return scalar::kAttentionKernels;
  }
}

}  // namespace pruneops
