// Stands in for what Hopper adds to CUDA: barriers in shared memory, copies of boxes of a tensor,
// products of warpgroups. All of it is asynchronous, and each part keeps the rules of the PTX
// manual strictly: what is not finished is poison (NaN, -1), and what a rule forbids ends the
// launch.

#pragma once

#include "sm90_barriers.h"
#include "sm90_box_copies.h"
#include "sm90_products.h"
