#define PRUNEOPS_ISA_SCALAR

#include "routing/cpu/router_impl.h"
