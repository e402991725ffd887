#define PRUNEOPS_ISA_AVX512

#include "compaction/cpu/scaled_impl.h"
