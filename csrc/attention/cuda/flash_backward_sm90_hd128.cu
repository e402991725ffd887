#include "attention/cuda/flash_backward_sm90.cuh"

namespace pruneops {

template cudaError_t launch_flash_backward_sm90<128>(const FlashBackwardParams&, const FlashDevice&,
                                                     cudaStream_t);

}  // namespace pruneops
