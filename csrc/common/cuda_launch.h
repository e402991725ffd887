// What the launching side of every CUDA family shares: device guard, current stream, device facts.
// Nothing here waits for the device.

#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/macros.h>

#include <array>
#include <cstdint>
#include <mutex>

namespace pruneops {

using torch::stable::accelerator::DeviceGuard;

// The stream torch would use now on this device.
inline cudaStream_t current_cuda_stream(int32_t device_index) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return static_cast<cudaStream_t>(stream);
}

struct CudaDevice {
  int num_sms;
  int compute_capability;  // 10 * major + minor
  int max_shared_bytes;    // that a block may have, static and dynamic, if it asks
};

// Facts about one device, asked for once.
inline const CudaDevice& cuda_device(int32_t device_index) {
  constexpr int32_t kMaxDevices = 64;
  static std::array<CudaDevice, kMaxDevices> devices{};
  static std::array<std::once_flag, kMaxDevices> once;
  STD_TORCH_CHECK(device_index >= 0 && device_index < kMaxDevices, "device index must be in [0, ",
                  kMaxDevices, "), got ", device_index);
  std::call_once(once[device_index], [device_index] {
    int major = 0;
    int minor = 0;
    CudaDevice& device = devices[device_index];
    STD_CUDA_CHECK(
        cudaDeviceGetAttribute(&device.num_sms, cudaDevAttrMultiProcessorCount, device_index));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_index));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_index));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&device.max_shared_bytes,
                                          cudaDevAttrMaxSharedMemoryPerBlockOptin, device_index));
    device.compute_capability = 10 * major + minor;
  });
  return devices[device_index];
}

}  // namespace pruneops
