// A CUDA driver that does nothing but tell what it is asked for, in place of the real one.
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include <cuda.h>

namespace {
int loads = 0;
long setting(const char* name, long otherwise) {
  const char* given = std::getenv(name);
  return given ? std::atol(given) : otherwise;
}
CUcontext context = reinterpret_cast<CUcontext>(setting("CONTEXT", 1));  // of device 1, where the tensors are
}  // namespace

#pragma GCC visibility push(hidden)
extern "C" {
CUresult cuGetErrorString(CUresult, const char** to) { return *to = "a fault", CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule* to, const void* image) {
  std::printf("load %.6s\n", static_cast<const char*>(image));
  return *to = reinterpret_cast<CUmodule>(static_cast<long>(++loads)), CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* to, CUmodule module, const char*) {
  return *to = reinterpret_cast<CUfunction>(module), setting("NO_FUNCTION", 0) ? CUDA_ERROR_NOT_FOUND : CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) {
  std::printf("unload %ld\n", reinterpret_cast<long>(module));
  return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction run, CUfunction_attribute, int bytes) {
  std::printf("shared %ld %d\n", reinterpret_cast<long>(run), bytes);
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* to) { return *to = context, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* to, int number) { return *to = number, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* to, CUdevice device) {
  std::printf("retain %d\n", device);
  return *to = reinterpret_cast<CUcontext>(static_cast<long>(device)), CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext chosen) { return context = chosen, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* to) { return *to = reinterpret_cast<long>(context), CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* to, CUdevice_attribute, CUdevice) {
  return *to = setting("MULTIPROCESSORS", 132), CUDA_SUCCESS;
}
CUresult cuMemsetD8Async(CUdeviceptr at, unsigned char, size_t bytes, CUstream) {
  std::printf("zeros %#llx %zu\n", at, bytes);
  return CUDA_SUCCESS;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap* to, CUtensorMapDataType type, cuuint32_t rank, void* at,
                                const cuuint64_t* shape, const cuuint64_t* strides, const cuuint32_t* block,
                                const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  std::printf("map %p type %d rank %u shape %lu %lu stride %lu block %u %u swizzle %d fill %d\n", at, type, rank,
              static_cast<long>(shape[0]), static_cast<long>(shape[1]), static_cast<long>(strides[0]), block[0], block[1],
              swizzle, fill);
  to->opaque[0] = reinterpret_cast<cuuint64_t>(at);
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* how, CUfunction run, void** arguments, void**) {
  std::printf("launch %ld on %u %u %u threads %u shared %u cooperative %u:", reinterpret_cast<long>(run), how->gridDimX,
              how->gridDimY, how->gridDimZ, how->blockDimX, how->sharedMemBytes, how->numAttrs);
  for (int i = 0; i < ARGUMENTS; ++i) std::printf(" %#lx", *static_cast<long*>(arguments[i]));
  std::printf("\n");
  return how->gridDimZ == 9 ? CUDA_ERROR_UNKNOWN : CUDA_SUCCESS;
}
}
#pragma GCC visibility pop
