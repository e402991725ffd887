#define PRUNEOPS_ISA_AVX2

#include "compaction/cpu/scaled_impl.h"
