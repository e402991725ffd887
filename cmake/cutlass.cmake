# What csrc takes for granted about Hopper's tensor cores, checked against CuTe: csrc/tests/cute/*.cpp become tests of their
# own where the headers of CUTLASS are at hand. These come from PRUNEOPS_CUTLASS_DIR (the folder of `cute` and `cutlass`), or
# else from the nvidia-cutlass wheel in the Python of the build. Nothing that is installed uses them.

set(PRUNEOPS_CUTLASS_DIR "" CACHE PATH "Folder with the headers of CUTLASS (found through Python when empty)")

set(cutlass_dir "${PRUNEOPS_CUTLASS_DIR}")
if(NOT cutlass_dir)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c "import importlib.util as u
spec = u.find_spec('cutlass_library')
print(spec.submodule_search_locations[0] + '/source/include' if spec else '')"
    OUTPUT_VARIABLE cutlass_dir OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
endif()

if(NOT EXISTS "${cutlass_dir}/cute/tensor.hpp")
  if(PRUNEOPS_CUTLASS_DIR)
    message(FATAL_ERROR "PRUNEOPS_CUTLASS_DIR=${PRUNEOPS_CUTLASS_DIR}: no cute/tensor.hpp there")
  endif()
  message(STATUS "Checks against CuTe: no, there are no headers of CUTLASS")
elseif(NOT PRUNEOPS_CUDA_ENABLED)
  message(STATUS "Checks against CuTe: no, they need the headers of CUDA")
else()
  message(STATUS "Checks against CuTe: yes, with ${cutlass_dir}")
  file(GLOB sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/csrc/tests/cute/*.cpp")
  foreach(source IN LISTS sources)
    get_filename_component(name "${source}" NAME_WE)
    set(name "test_cute_${name}")
    add_executable(${name} "${source}")
    target_include_directories(${name} PRIVATE "${PROJECT_SOURCE_DIR}/csrc" "${PROJECT_SOURCE_DIR}/csrc/tests")
    # Since CUDA 13 the headers of libcu++ have a folder of their own.
    target_include_directories(${name} SYSTEM PRIVATE "${cutlass_dir}" ${CUDAToolkit_INCLUDE_DIRS})
    foreach(folder IN LISTS CUDAToolkit_INCLUDE_DIRS)
      target_include_directories(${name} SYSTEM PRIVATE "${folder}/cccl")
    endforeach()
    add_test(NAME ${name} COMMAND ${name})
  endforeach()
endif()
