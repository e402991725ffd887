#include "attention/cuda/flash_forward_sm80.cuh"

namespace pruneops {

template cudaError_t launch_flash_forward_sm80<80>(const FlashForwardParams&, const FlashDevice&,
                                                   cudaStream_t);

}  // namespace pruneops
