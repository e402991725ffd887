#define PRUNEOPS_ISA_AVX512BF16

#include "attention/cpu/kernels.h"
