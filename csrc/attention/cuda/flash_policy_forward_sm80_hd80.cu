#include "attention/cuda/flash_policy_forward_sm80.cuh"

namespace pruneops {

template cudaError_t launch_flash_policy_forward_sm80<80>(const FlashPolicyForwardParams&,
                                                          cudaStream_t);

}  // namespace pruneops
