#define PRUNEOPS_ISA_AVX2

#include "clustering/cpu/kernels.h"
