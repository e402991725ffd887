#include "attention/cuda/flash_policy_backward_sm80.cuh"

namespace pruneops {

template cudaError_t launch_flash_policy_backward_sm80<128>(const FlashPolicyBackwardParams&,
                                                            cudaStream_t);

}  // namespace pruneops
