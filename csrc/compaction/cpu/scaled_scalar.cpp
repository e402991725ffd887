#define PRUNEOPS_ISA_SCALAR

#include "compaction/cpu/scaled_impl.h"
