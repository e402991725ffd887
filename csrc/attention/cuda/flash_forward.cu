// Which kernels a forward pass takes.

#include <initializer_list>

#include "attention/cuda/flash.h"

namespace pruneops {
namespace {

template <int kHeadDim>
cudaError_t launch_head_dim(const FlashForwardParams& params, const FlashDevice& device,
                            cudaStream_t stream) {
#ifdef PRUNEOPS_WITH_SM90
  if (device.compute_capability == 90 && params.softmax_scale > 0.0f) {
    return launch_flash_forward_sm90<kHeadDim>(params, device, stream);
  }
#endif
  return launch_flash_forward_sm80<kHeadDim>(params, device, stream);
}

}  // namespace

cudaError_t launch_flash_forward(const FlashForwardParams& params, const FlashDevice& device,
                                 cudaStream_t stream) {
  if (!flash_supports(params.q.type, params.heads.head_dim)) return cudaErrorInvalidValue;
  for (const RowView* rows : {&params.q, &params.k, &params.v, &params.out}) {
    if (!flash_reads(*rows)) return cudaErrorInvalidValue;
  }
  switch (params.heads.head_dim) {
    case 64:
      return launch_head_dim<64>(params, device, stream);
    case 80:
      return launch_head_dim<80>(params, device, stream);
    case 96:
      return launch_head_dim<96>(params, device, stream);
    default:
      return launch_head_dim<128>(params, device, stream);
  }
}

}  // namespace pruneops
