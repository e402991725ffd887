// Which instruction sets this machine has, which of them this build was compiled for, and which one
// the kernels use.

#pragma once

namespace pruneops {

// Ordered: a later value includes every earlier one.
enum class Isa { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

// What the CPU and the operating system support, each flag on its own.
struct CpuFeatures {
  bool avx2;         // AVX2
  bool fma;          // FMA3
  bool f16c;         // half <-> float conversion
  bool avx512f;      // AVX-512 foundation
  bool avx512bw;     // ... byte and word
  bool avx512vl;     // ... 128 and 256 bit forms
  bool avx512dq;     // ... doubleword and quadword
  bool avx512_bf16;  // bfloat16 dot product
};

const CpuFeatures& cpu_features();

// "scalar", "avx2", "avx512" or "avx512bf16".
const char* isa_name(Isa isa);

// True if this build contains the kernels of `isa`.
bool isa_compiled(Isa isa);

// The best ISA that the machine supports and this build contains.
Isa best_isa();

// The ISA the kernels use: best_isa(), or the one that the environment variable PRUNEOPS_CPU_ISA
// names. Read once. Throws std::runtime_error if the variable holds an unknown name or an ISA that
// the machine or this build lacks.
Isa active_isa();

}  // namespace pruneops
