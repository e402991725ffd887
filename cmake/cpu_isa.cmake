# Per-ISA compilation. A kernel file named <name>_<isa>.cpp is compiled with the flags of that ISA; which of the
# compiled variants runs is decided at run time by csrc/common/cpu_features.cpp. Everything else is compiled for the
# plain baseline of the architecture, so the library loads on any machine of that architecture.

include(CheckCXXCompilerFlag)

set(PRUNEOPS_ISA_FLAGS_scalar "")
set(PRUNEOPS_ISA_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(PRUNEOPS_ISA_FLAGS_avx512
  ${PRUNEOPS_ISA_FLAGS_avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512)
set(PRUNEOPS_ISA_FLAGS_avx512bf16 ${PRUNEOPS_ISA_FLAGS_avx512} -mavx512bf16)

# PRUNEOPS_ISAS: the variants this compiler can build. PRUNEOPS_ISA_DEFINITIONS tells the sources the same.
set(PRUNEOPS_ISAS scalar)
set(PRUNEOPS_ISA_DEFINITIONS "")
if(PRUNEOPS_X86)
  foreach(isa avx2 avx512 avx512bf16)
    string(REPLACE ";" " " flags "${PRUNEOPS_ISA_FLAGS_${isa}}")
    check_cxx_compiler_flag("${flags}" PRUNEOPS_COMPILER_HAS_${isa})
    if(PRUNEOPS_COMPILER_HAS_${isa})
      string(TOUPPER "${isa}" isa_upper)
      list(APPEND PRUNEOPS_ISAS ${isa})
      list(APPEND PRUNEOPS_ISA_DEFINITIONS PRUNEOPS_HAVE_${isa_upper}=1)
    endif()
  endforeach()
endif()

# Kernels get -O3 whatever the build type; instrumented ones would take minutes to compile at that level.
if(PRUNEOPS_SANITIZE)
  set(PRUNEOPS_KERNEL_OPTIMIZATION -O1)
else()
  set(PRUNEOPS_KERNEL_OPTIMIZATION -O3)
endif()

# Drops from the list variable `sources_var` the files of ISAs that are not built and sets the flags of the others.
function(pruneops_filter_isa_sources sources_var)
  set(kept "")
  foreach(source IN LISTS ${sources_var})
    if(source MATCHES "_(scalar|avx2|avx512|avx512bf16)\\.cpp$")
      set(isa "${CMAKE_MATCH_1}")
      if(NOT isa IN_LIST PRUNEOPS_ISAS)
        continue()
      endif()
      set_source_files_properties("${source}" PROPERTIES COMPILE_OPTIONS "${PRUNEOPS_KERNEL_OPTIMIZATION};${PRUNEOPS_ISA_FLAGS_${isa}}")
    endif()
    list(APPEND kept "${source}")
  endforeach()
  set(${sources_var} "${kept}" PARENT_SCOPE)
endfunction()
