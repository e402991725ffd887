#define PRUNEOPS_ISA_AVX512

#include "clustering/cpu/kernels.h"
