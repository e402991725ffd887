#define PRUNEOPS_ISA_SCALAR

#include "clustering/cpu/kernels.h"
