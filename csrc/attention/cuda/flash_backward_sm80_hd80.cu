#include "attention/cuda/flash_backward_sm80.cuh"

namespace pruneops {

template cudaError_t launch_flash_backward_sm80<80>(const FlashBackwardParams&, const FlashDevice&,
                                                    cudaStream_t);

}  // namespace pruneops
