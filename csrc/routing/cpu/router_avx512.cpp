#define PRUNEOPS_ISA_AVX512

#include "routing/cpu/router_impl.h"
