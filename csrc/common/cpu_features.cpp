#include "common/cpu_features.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace pruneops {
namespace {

#if defined(__x86_64__)

bool bit(uint32_t word, int position) { return ((word >> position) & 1u) != 0; }

// Register state that the operating system saves and restores (XCR0). An instruction set that the
// CPU has is usable only if its registers are among it.
uint64_t os_saved_state() {
  uint32_t low = 0;
  uint32_t high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

CpuFeatures detect() {
  CpuFeatures f{};
  uint32_t a = 0;
  uint32_t b = 0;
  uint32_t c = 0;
  uint32_t d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0) return f;
  const bool has_xgetbv = bit(c, 27);
  const bool fma = bit(c, 12);
  const bool f16c = bit(c, 29);
  const uint64_t state = has_xgetbv ? os_saved_state() : 0;
  const bool ymm = (state & 0x06) == 0x06;
  const bool zmm = (state & 0xe6) == 0xe6;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return f;
  f.fma = ymm && fma;
  f.f16c = ymm && f16c;
  f.avx2 = ymm && bit(b, 5);
  f.avx512f = zmm && bit(b, 16);
  f.avx512dq = zmm && bit(b, 17);
  f.avx512bw = zmm && bit(b, 30);
  f.avx512vl = zmm && bit(b, 31);
  const uint32_t max_subleaf = a;
  if (max_subleaf >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0) {
    f.avx512_bf16 = zmm && bit(a, 5);
  }
  return f;
}

#else

CpuFeatures detect() { return CpuFeatures{}; }

#endif

constexpr Isa kAllIsas[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16};

bool machine_has(Isa isa) {
  const CpuFeatures& f = cpu_features();
  const bool avx2 = f.avx2 && f.fma && f.f16c;
  const bool avx512 = avx2 && f.avx512f && f.avx512bw && f.avx512vl && f.avx512dq;
  switch (isa) {
    case Isa::kScalar:
      return true;
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx512Bf16:
      return avx512 && f.avx512_bf16;
  }
  return false;
}

Isa choose_isa() {
  const char* wanted = std::getenv("PRUNEOPS_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best_isa();
  for (Isa isa : kAllIsas) {
    if (std::strcmp(wanted, isa_name(isa)) != 0) continue;
    if (!isa_compiled(isa)) {
      throw std::runtime_error(std::string("PRUNEOPS_CPU_ISA=") + wanted +
                               ": this build of pruneops does not contain this instruction set");
    }
    if (!machine_has(isa)) {
      throw std::runtime_error(std::string("PRUNEOPS_CPU_ISA=") + wanted +
                               ": this machine does not support it; the best it supports is " +
                               isa_name(best_isa()));
    }
    return isa;
  }
  throw std::runtime_error(std::string("PRUNEOPS_CPU_ISA=") + wanted +
                           ": expected scalar, avx2, avx512 or avx512bf16");
}

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return "scalar";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512bf16";
  }
  return "unknown";
}

bool isa_compiled(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return true;
    case Isa::kAvx2:
#if defined(PRUNEOPS_HAVE_AVX2)
      return true;
#else
      return false;
#endif
    case Isa::kAvx512:
#if defined(PRUNEOPS_HAVE_AVX512)
      return true;
#else
      return false;
#endif
    case Isa::kAvx512Bf16:
#if defined(PRUNEOPS_HAVE_AVX512BF16)
      return true;
#else
      return false;
#endif
  }
  return false;
}

Isa best_isa() {
  Isa best = Isa::kScalar;
  for (Isa isa : kAllIsas) {
    if (isa_compiled(isa) && machine_has(isa)) best = isa;
  }
  return best;
}

Isa active_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

}  // namespace pruneops
