#include "attention/cuda/flash_forward_sm90.cuh"

namespace pruneops {

template cudaError_t launch_flash_forward_sm90<96>(const FlashForwardParams&, const FlashDevice&,
                                                   cudaStream_t);

}  // namespace pruneops
