#define PRUNEOPS_ISA_SCALAR

#include "attention/cpu/kernels.h"
