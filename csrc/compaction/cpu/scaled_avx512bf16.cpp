#define PRUNEOPS_ISA_AVX512BF16

#include "compaction/cpu/scaled_impl.h"
