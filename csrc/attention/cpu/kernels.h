// The kernel table of one instruction set. Included once by each kernels_<isa>.cpp.

#pragma once

#include "attention/cpu/decode.h"
#include "attention/cpu/flash_backward.h"
#include "attention/cpu/flash_forward.h"
#include "attention/cpu/policy.h"
#include "attention/cpu/scores.h"

namespace pruneops {
namespace PRUNEOPS_ISA_NAMESPACE {
namespace {

int64_t workspace_bytes(const Heads& heads) {
  const int64_t d = heads.head_dim;
  return max_of(max_of(forward_workspace_bytes(d), backward_workspace_bytes(d)),
                max_of(decode_workspace_bytes(d), score_workspace_bytes(d)));
}

}  // namespace

extern const AttentionKernels kAttentionKernels;
const AttentionKernels kAttentionKernels = {
    kQueryBlockRows, kGradRows,      kGradKeys,       kScoreKeys, workspace_bytes, forward,
    backward,        policy_forward, policy_backward, decode,     direct_scores,   column_scores,
};

}  // namespace PRUNEOPS_ISA_NAMESPACE
}  // namespace pruneops
