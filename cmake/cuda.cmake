# Whether the CUDA library is built, for which architectures, and if not, why.
#
#   PRUNEOPS_CUDA=0     never
#   PRUNEOPS_CUDA=auto  if an nvcc is found that works
#   PRUNEOPS_CUDA=1     always; configuring fails without a working nvcc
#
# Sets PRUNEOPS_CUDA_ENABLED, PRUNEOPS_CUDA_REASON (empty when enabled), PRUNEOPS_CUDA_ARCHS (as `80;90a`) and, when
# enabled, turns on the CUDA language. No CUDA part of torch is needed: the stable-ABI headers come with every torch.

set(PRUNEOPS_CUDA "auto" CACHE STRING "CUDA library: auto, 0 or 1")
set(PRUNEOPS_CUDA_ARCH_LIST "" CACHE STRING "GPU architectures such as 80;90a (empty: 80;90a;100, as far as nvcc knows them)")
set(PRUNEOPS_CUDA_DEFAULT_ARCHS 80 90a 100)

# Runs nvcc on a small program. Sets `result` to the empty string, or to the first line of what went wrong.
#   ARGN  what nvcc is asked to make of it
function(pruneops_try_nvcc result)
  set(folder "${CMAKE_BINARY_DIR}/cuda_probe")
  file(WRITE "${folder}/probe.cu" "#include <cuda_runtime.h>
__global__ void fill(int* out) { *out = 1; }
int main() {
  fill<<<1, 1>>>(nullptr);
  return cudaGetLastError() == cudaSuccess ? 0 : 1;
}
")
  execute_process(
    COMMAND "${PRUNEOPS_NVCC}" -std=c++17 ${ARGN} probe.cu
    WORKING_DIRECTORY "${folder}" RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output)
  set(message "")
  if(NOT status STREQUAL "0")
    string(STRIP "${output}" message)
    string(REGEX REPLACE "\n.*" "" message "${message}")
    if(NOT message)
      set(message "it ended with: ${status}")
    endif()
  endif()
  set(${result} "${message}" PARENT_SCOPE)
endfunction()

# Looks for nvcc, tries it, and asks it for each architecture.
macro(pruneops_probe_cuda)
  set(PRUNEOPS_CUDA_REASON "")
  set(PRUNEOPS_CUDA_ARCHS "")
  find_program(PRUNEOPS_NVCC nvcc
    HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin
    DOC "The CUDA compiler")
  if(DEFINED ENV{CUDACXX} AND EXISTS "$ENV{CUDACXX}")
    set(PRUNEOPS_NVCC "$ENV{CUDACXX}")
  endif()
  if(NOT PRUNEOPS_NVCC)
    set(PRUNEOPS_CUDA_REASON "no nvcc was found when it was built")
  else()
    pruneops_try_nvcc(error -o probe)
    if(error)
      set(PRUNEOPS_CUDA_REASON "${PRUNEOPS_NVCC} did not compile a small program: ${error}")
    endif()
  endif()
  if(NOT PRUNEOPS_CUDA_REASON)
    set(wanted "${PRUNEOPS_CUDA_ARCH_LIST}")
    if(NOT wanted)
      set(wanted ${PRUNEOPS_CUDA_DEFAULT_ARCHS})
    endif()
    foreach(arch IN LISTS wanted)
      pruneops_try_nvcc(error -gencode "arch=compute_${arch},code=sm_${arch}" -cubin -o probe.cubin)
      if(NOT error)
        list(APPEND PRUNEOPS_CUDA_ARCHS "${arch}")
      elseif(PRUNEOPS_CUDA_ARCH_LIST)
        set(PRUNEOPS_CUDA_REASON "${PRUNEOPS_NVCC} does not compile for ${arch} of PRUNEOPS_CUDA_ARCH_LIST: ${error}")
      endif()
    endforeach()
    if(NOT PRUNEOPS_CUDA_ARCHS AND NOT PRUNEOPS_CUDA_REASON)
      set(PRUNEOPS_CUDA_REASON "${PRUNEOPS_NVCC} compiles for none of ${wanted}")
    endif()
  endif()
  # The text becomes a string literal of the build info.
  string(REGEX REPLACE "[\"\\\\]" "'" PRUNEOPS_CUDA_REASON "${PRUNEOPS_CUDA_REASON}")
  string(REPLACE ";" " " PRUNEOPS_CUDA_REASON "${PRUNEOPS_CUDA_REASON}")
endmacro()

if(NOT PRUNEOPS_CUDA MATCHES "^(auto|0|1)$")
  message(FATAL_ERROR "PRUNEOPS_CUDA=${PRUNEOPS_CUDA}: expected auto, 0 or 1")
endif()
# Users may write 80,90a as well.
string(REGEX REPLACE "[, ]+" ";" PRUNEOPS_CUDA_ARCH_LIST "${PRUNEOPS_CUDA_ARCH_LIST}")
set(PRUNEOPS_CUDA_ENABLED FALSE)
set(PRUNEOPS_CUDA_ARCHS "")
if(PRUNEOPS_CUDA STREQUAL "0")
  set(PRUNEOPS_CUDA_REASON "PRUNEOPS_CUDA=0 was set when it was built")
elseif(PRUNEOPS_SANITIZE)
  set(PRUNEOPS_CUDA_REASON "a build with sanitizers has no CUDA library")
else()
  pruneops_probe_cuda()
  if(NOT PRUNEOPS_CUDA_REASON)
    set(PRUNEOPS_CUDA_ENABLED TRUE)
  endif()
endif()

if(PRUNEOPS_CUDA_ENABLED)
  set(CMAKE_CUDA_COMPILER "${PRUNEOPS_NVCC}")
  set(CMAKE_CUDA_STANDARD 17)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_EXTENSIONS OFF)
  set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  # Machine code for each; intermediate code as well for plain numbers, so that newer GPUs run it. Code for 90a is of
  # no use anywhere else.
  set(CMAKE_CUDA_ARCHITECTURES "")
  foreach(arch IN LISTS PRUNEOPS_CUDA_ARCHS)
    if(arch MATCHES "[a-z]$")
      set(arch "${arch}-real")
    endif()
    list(APPEND CMAKE_CUDA_ARCHITECTURES "${arch}")
  endforeach()
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  message(STATUS "CUDA library: yes, for ${PRUNEOPS_CUDA_ARCHS}, with ${PRUNEOPS_NVCC} ${CMAKE_CUDA_COMPILER_VERSION}")
else()
  message(STATUS "CUDA library: no, ${PRUNEOPS_CUDA_REASON}")
  if(PRUNEOPS_CUDA STREQUAL "1")
    message(FATAL_ERROR "PRUNEOPS_CUDA=1, but ${PRUNEOPS_CUDA_REASON}")
  endif()
endif()
# What targets with kernels share. The launcher keeps the report of ptxas beside each object file.
function(pruneops_cuda_defaults target)
  pruneops_target_defaults(${target})
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=-v>)
  set(launcher "${Python_EXECUTABLE}" "${PROJECT_SOURCE_DIR}/cmake/ptxas_log.py")
  if(PRUNEOPS_CCACHE)
    list(APPEND launcher "${PRUNEOPS_CCACHE}")
  endif()
  set_target_properties(${target} PROPERTIES CUDA_COMPILER_LAUNCHER "${launcher}")
endfunction()

# Writes cuda_kernels.json and cuda_kernels.md into the build folder whenever `target` was linked.
function(pruneops_report_kernels target)
  add_custom_command(TARGET ${target} POST_BUILD
    COMMAND "${Python_EXECUTABLE}" "${PROJECT_SOURCE_DIR}/cmake/build_report.py" --nvcc "${CMAKE_CUDA_COMPILER}" "${CMAKE_BINARY_DIR}"
    COMMENT "Reporting what the kernels use")
endfunction()

# Where setup.py reads the outcome.
set(PRUNEOPS_CUDA_BUILT "${PRUNEOPS_CUDA_ENABLED}" CACHE INTERNAL "Whether the target _C_cuda exists")
