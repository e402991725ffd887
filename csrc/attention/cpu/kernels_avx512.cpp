#define PRUNEOPS_ISA_AVX512

#include "attention/cpu/kernels.h"
