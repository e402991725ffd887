# C++ tests of the torch-free kernels: every csrc/tests/test_*.cpp becomes one executable, run by `ctest`. Those named
# test_*_cuda_on_host.cpp run CUDA kernels on the CPU, through the stand-ins in csrc/tests/cuda_on_host; they need no nvcc.

enable_testing()
find_package(Threads REQUIRED)
file(GLOB test_sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/csrc/tests/test_*.cpp")
foreach(source IN LISTS test_sources)
  get_filename_component(name "${source}" NAME_WE)
  add_executable(${name} "${source}" $<TARGET_OBJECTS:pruneops_kernels>)
  pruneops_target_defaults(${name})
  target_link_libraries(${name} PRIVATE Threads::Threads)
  if(name MATCHES "_cuda_on_host$")
    target_include_directories(${name} BEFORE PRIVATE "${PROJECT_SOURCE_DIR}/csrc/tests/cuda_on_host")
    target_compile_options(${name} PRIVATE -Wno-unknown-pragmas -Wno-psabi -fno-strict-aliasing)
  endif()
  add_test(NAME ${name} COMMAND ${name})
endforeach()
