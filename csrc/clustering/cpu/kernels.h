// The kernel table of one instruction set. Included once by each kernels_<isa>.cpp.

#pragma once

#include "clustering/cpu/distances.h"
#include "clustering/cpu/mean.h"
#include "clustering/cpu/position_means.h"
#include "clustering/cpu/rows.h"

namespace pruneops {
namespace PRUNEOPS_ISA_NAMESPACE {

extern const ClusterKernels kClusterKernels;
const ClusterKernels kClusterKernels = {
    kPanelRows,   kTilePanels,           choose_origin,  pack,
    kPackScratch, store_distances,       tile_distances, update_nearest,
    update_delta, update_nearest_center, mean,           position_means,
};

}  // namespace PRUNEOPS_ISA_NAMESPACE
}  // namespace pruneops
