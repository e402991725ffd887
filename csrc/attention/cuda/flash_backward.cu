// Which kernels a backward pass takes.

#include "attention/cuda/flash_backward.h"

namespace pruneops {
namespace {

template <int kHeadDim>
cudaError_t launch_head_dim_backward(const FlashBackwardParams& params, const FlashDevice& device,
                                     cudaStream_t stream) {
#ifdef PRUNEOPS_WITH_SM90
  if (device.compute_capability == 90) {
    return launch_flash_backward_sm90<kHeadDim>(params, device, stream);
  }
#endif
  return launch_flash_backward_sm80<kHeadDim>(params, device, stream);
}

}  // namespace

cudaError_t launch_flash_backward(const FlashBackwardParams& params, const FlashDevice& device,
                                  cudaStream_t stream) {
  if (!flash_supports(params.q.type, params.heads.head_dim)) return cudaErrorInvalidValue;
  switch (params.heads.head_dim) {
    case 64:
      return launch_head_dim_backward<64>(params, device, stream);
    case 80:
      return launch_head_dim_backward<80>(params, device, stream);
    case 96:
      return launch_head_dim_backward<96>(params, device, stream);
    default:
      return launch_head_dim_backward<128>(params, device, stream);
  }
}

}  // namespace pruneops
