// Linked in the place of libtorch_cuda.so: the stable shims that the CUDA library takes from there,
// and no others. When pruneops runs, the real library of a CUDA build of torch is in its place.

#define SHIM extern "C" __attribute__((visibility("default")))

SHIM int aoti_torch_get_current_cuda_stream(int, void** stream) {
  *stream = nullptr;
  return 1;
}

SHIM int torch_c10_cuda_check_msg(int, const char*, const char*, unsigned, bool, char** message) {
  *message = nullptr;
  return 1;
}

SHIM void torch_c10_cuda_free_error_msg(char*) {}
