#define PRUNEOPS_ISA_AVX512BF16

#include "routing/cpu/router_impl.h"
