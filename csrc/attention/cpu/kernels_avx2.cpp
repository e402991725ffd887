#define PRUNEOPS_ISA_AVX2

#include "attention/cpu/kernels.h"
