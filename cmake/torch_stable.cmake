# Torch headers and library, without find_package(Torch): the stable ABI needs one include directory, the symbols of
# libtorch_cpu and nothing else (no ATen flags, no protobuf, no CUDA detection).

set(PRUNEOPS_TORCH_DIR "" CACHE PATH "Directory of the installed torch package (found through Python when empty)")
# The lowest torch whose stable ABI is used: the built library runs on this and every later version.
set(PRUNEOPS_TORCH_TARGET "2.10")
set(PRUNEOPS_TORCH_TARGET_HEX "0x020a000000000000")

if(NOT PRUNEOPS_TORCH_DIR)
  find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
      "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
    OUTPUT_VARIABLE PRUNEOPS_TORCH_DIR OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
endif()

file(STRINGS "${PRUNEOPS_TORCH_DIR}/version.py" torch_version_line REGEX "^__version__ = ")
string(REGEX REPLACE "^__version__ = '([^']*)'.*" "\\1" PRUNEOPS_TORCH_VERSION "${torch_version_line}")
if(PRUNEOPS_TORCH_VERSION VERSION_LESS "${PRUNEOPS_TORCH_TARGET}")
  message(FATAL_ERROR "torch ${PRUNEOPS_TORCH_VERSION} found; building pruneops needs ${PRUNEOPS_TORCH_TARGET} or later")
endif()

find_library(PRUNEOPS_TORCH_CPU_LIBRARY torch_cpu PATHS "${PRUNEOPS_TORCH_DIR}/lib" NO_DEFAULT_PATH REQUIRED)

# No run path is recorded: `import torch` has libtorch_cpu in the process before pruneops loads its library.
function(pruneops_use_torch_stable target)
  target_include_directories(${target} SYSTEM PRIVATE "${PRUNEOPS_TORCH_DIR}/include")
  target_compile_definitions(${target} PRIVATE TORCH_TARGET_VERSION=${PRUNEOPS_TORCH_TARGET_HEX})
  target_link_libraries(${target} PRIVATE "${PRUNEOPS_TORCH_CPU_LIBRARY}")
  set_target_properties(${target} PROPERTIES SKIP_BUILD_RPATH ON)
endfunction()
