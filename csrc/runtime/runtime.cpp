// pruneops._runtime: what this build is and what this machine has. No tensors, no torch.

#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "common/cpu_features.h"

namespace py = pybind11;
using namespace pybind11::literals;
using pruneops::Isa;

namespace {

py::dict build_info() {
  py::list isas;
  for (Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16}) {
    if (pruneops::isa_compiled(isa)) isas.append(pruneops::isa_name(isa));
  }
  py::list cuda_archs, flash_head_dims;
  std::istringstream archs(PRUNEOPS_CUDA_ARCHS), head_dims(PRUNEOPS_FLASH_HEAD_DIMS);
  for (std::string arch; std::getline(archs, arch, ',');) cuda_archs.append(arch);
  for (std::string dim; std::getline(head_dims, dim, ',');) flash_head_dims.append(std::stoi(dim));
  return py::dict("version"_a = PRUNEOPS_VERSION, "compiler"_a = PRUNEOPS_COMPILER,
                  "cxx_flags"_a = PRUNEOPS_CXX_FLAGS, "cxx_standard"_a = __cplusplus,
                  "torch_build_version"_a = PRUNEOPS_TORCH_BUILD_VERSION,
                  "torch_target_version"_a = PRUNEOPS_TORCH_TARGET, "isas"_a = isas,
                  "sanitized"_a = static_cast<bool>(PRUNEOPS_SANITIZED),
                  "cuda"_a = static_cast<bool>(PRUNEOPS_CUDA_ENABLED),
                  "cuda_reason"_a = PRUNEOPS_CUDA_REASON, "cuda_version"_a = PRUNEOPS_CUDA_VERSION,
                  "cuda_archs"_a = cuda_archs, "flash_head_dims"_a = flash_head_dims);
}

py::dict cpu_features() {
  const pruneops::CpuFeatures& f = pruneops::cpu_features();
  return py::dict("avx2"_a = f.avx2, "fma"_a = f.fma, "f16c"_a = f.f16c, "avx512f"_a = f.avx512f,
                  "avx512bw"_a = f.avx512bw, "avx512vl"_a = f.avx512vl, "avx512dq"_a = f.avx512dq,
                  "avx512_bf16"_a = f.avx512_bf16);
}

}  // namespace

PYBIND11_MODULE(_runtime, m) {
  m.doc() = "Facts about this build of pruneops and about the machine.";
  m.def("build_info", &build_info,
        "What was compiled: version, compiler, flags, torch versions, instruction sets, CUDA.");
  m.def("cpu_features", &cpu_features, "Instruction sets this CPU and operating system support.");
  m.def(
      "active_isa", [] { return std::string(pruneops::isa_name(pruneops::active_isa())); },
      "Name of the instruction set the CPU kernels use. PRUNEOPS_CPU_ISA overrides the choice; a "
      "value that is unknown or not supported raises RuntimeError.");
}
