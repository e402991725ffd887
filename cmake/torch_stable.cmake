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

# The CUDA library names libtorch_cuda.so as a dependency, because libtorch does not offer its symbols to everybody. It is
# linked against a stub of that name, whatever torch is installed: a CPU build of torch has no such library, and the stub
# lists the symbols that may be used. The stub is not installed.
function(pruneops_use_torch_cuda target)
  add_library(torch_cuda_stub SHARED "${PROJECT_SOURCE_DIR}/cmake/torch_cuda_stub.cpp")
  set_target_properties(torch_cuda_stub PROPERTIES OUTPUT_NAME torch_cuda
    LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/torch_cuda_stub")
  # USE_CUDA makes torch's stable headers declare the stream functions.
  target_compile_definitions(${target} PRIVATE USE_CUDA)
  # Recorded even where the linker finds it unused; and every symbol must come from a library named here.
  target_link_libraries(${target} PRIVATE -Wl,--no-as-needed torch_cuda_stub -Wl,--as-needed -Wl,-z,defs)
endfunction()
