#define PRUNEOPS_ISA_AVX2

#include "routing/cpu/router_impl.h"
