# Compiler launcher, warnings, sanitizers: what every target shares.

find_program(PRUNEOPS_CCACHE ccache)
if(PRUNEOPS_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_CXX_COMPILER_LAUNCHER "${PRUNEOPS_CCACHE}")
endif()

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  set(PRUNEOPS_X86 ON)
else()
  set(PRUNEOPS_X86 OFF)
endif()

# Adds the include path, warnings, ISA definitions and (if asked for) sanitizers to `target`.
function(pruneops_target_defaults target)
  target_include_directories(${target} PRIVATE "${PROJECT_SOURCE_DIR}/csrc")
  # The prefix map keeps the path of the build machine out of error messages and binaries.
  set(prefix_map "-ffile-prefix-map=${PROJECT_SOURCE_DIR}/=")
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;$<$<BOOL:${PRUNEOPS_WERROR}>:-Werror>;${prefix_map}>
    $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra,${prefix_map};$<$<BOOL:${PRUNEOPS_WERROR}>:-Werror=all-warnings>>)
  target_compile_definitions(${target} PRIVATE ${PRUNEOPS_ISA_DEFINITIONS})
  if(PRUNEOPS_SANITIZE)
    # GCC's own intrinsics headers trip -Wmaybe-uninitialized when they are instrumented.
    target_compile_options(${target} PRIVATE -Wno-maybe-uninitialized)
    set(flags -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g)
    target_compile_options(${target} PRIVATE ${flags})
    target_link_options(${target} PRIVATE ${flags})
  endif()
endfunction()
