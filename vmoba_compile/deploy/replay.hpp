// Recorded launches, done again by the CUDA driver alone: what the code of a package with VMoBA attention includes behind
// the tables of its plans, see replay.py. Everything but the two functions that the package calls has internal linkage,
// so that several packages in one process stay apart.
#include <cstdint>
#include <cstdio>
#include <exception>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include <cuda.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace vmoba_replay {
namespace {

constexpr uint64_t ALIGNMENT = 16;  // bytes: what the kernels were compiled for

struct Kernel {
  const char* name;
  const unsigned char* image;  // cubin
  unsigned threads, shared;
  bool cooperative;
};

// A tensor map is encoded anew in every call, for the address of its place.
struct Map {
  int place;
  CUtensorMapDataType type;
  CUtensorMapSwizzle swizzle;
  CUtensorMapFloatOOBfill fill;
  std::vector<cuuint64_t> shape, strides;  // innermost first; strides in bytes, of all but the innermost
  std::vector<cuuint32_t> block;
};

struct Argument {
  enum Kind { BITS, PLACE, MAP } kind;
  uint64_t value;  // the argument itself, or the number of a place or a map
};

struct Launch {
  int kernel;
  unsigned x, y, z;
  std::vector<Argument> arguments;
};

struct Layout {
  int32_t dtype;
  std::vector<int64_t> sizes, strides;
};

struct Place {
  size_t area;  // an input, scratch memory, zeros or an output, in this order
  int64_t offset;
};

struct Plan {
  std::vector<Layout> inputs, outputs;
  int64_t scratch, zeros;  // bytes
  std::vector<Place> places;
  std::vector<Map> maps;
  std::vector<Launch> launches;
};

const std::vector<Kernel>& kernels();
const std::vector<Plan>& plans();

void check(CUresult status, const char* what) {
  if (status == CUDA_SUCCESS) return;
  const char* text = nullptr;
  cuGetErrorString(status, &text);
  throw std::runtime_error(std::string(what) + ": " + (text ? text : "unknown error"));
}

void check(AOTITorchError status, const char* what) {
  if (status != AOTI_TORCH_SUCCESS) throw std::runtime_error(std::string(what) + " failed");
}

CUfunction function_of(CUmodule module, const Kernel& kernel) {
  CUfunction made;
  check(cuModuleGetFunction(&made, module, kernel.name), kernel.name);
  if (kernel.shared > 48 * 1024) {
    check(cuFuncSetCacheConfig(made, CU_FUNC_CACHE_PREFER_SHARED), kernel.name);
    check(cuFuncSetAttribute(made, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, kernel.shared), kernel.name);
  }
  return made;
}

// A kernel on the current device, loaded when it is first needed and kept until the process ends.
CUfunction function(int device, int number) {
  static std::mutex lock;
  static std::map<std::pair<int, int>, CUfunction> loaded;
  std::lock_guard<std::mutex> guard(lock);
  CUfunction& found = loaded[{device, number}];
  if (!found) {
    const Kernel& kernel = kernels()[number];
    CUmodule module;
    check(cuModuleLoadData(&module, kernel.image), kernel.name);
    try {
      found = function_of(module, kernel);
    } catch (...) {
      cuModuleUnload(module);
      throw;
    }
  }
  return found;
}

struct Tensor {  // owns what it holds, unless it is handed on
  AtenTensorHandle handle = nullptr;
  Tensor(const Layout& layout, int device) {
    check(aoti_torch_empty_strided(layout.sizes.size(), layout.sizes.data(), layout.strides.data(), layout.dtype,
                                   aoti_torch_device_type_cuda(), device, &handle),
          "allocating memory");
  }
  explicit Tensor(AtenTensorHandle copied) {
    check(aoti_torch_clone_preserve_strides(copied, &handle), "copying an input");
  }
  Tensor(Tensor&& other) noexcept : handle(other.release()) {}
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor() {
    if (handle) aoti_torch_delete_tensor_object(handle);
  }
  AtenTensorHandle release() {
    AtenTensorHandle given = handle;
    handle = nullptr;
    return given;
  }
};

uint64_t address(AtenTensorHandle tensor) {
  void* data = nullptr;
  check(aoti_torch_get_data_ptr(tensor, &data), "reading an address");
  return reinterpret_cast<uint64_t>(data);
}

std::string list(const int64_t* numbers, int64_t count) {
  std::string text = " [";
  for (int64_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(numbers[i]);
  return text + "]";
}

// Of what the launches were recorded for; sizes of 1 have any stride. Whether there is anything in it.
bool expect(AtenTensorHandle tensor, const Layout& layout, const char* name) {
  int64_t dims = 0, *sizes = nullptr, *strides = nullptr;
  int32_t dtype = 0;
  check(aoti_torch_get_dim(tensor, &dims), "reading a shape");
  check(aoti_torch_get_dtype(tensor, &dtype), "reading a dtype");
  check(aoti_torch_get_sizes(tensor, &sizes), "reading a shape");
  check(aoti_torch_get_strides(tensor, &strides), "reading strides");
  bool same = dtype == layout.dtype && dims == static_cast<int64_t>(layout.sizes.size());
  bool empty = false;
  for (int64_t i = 0; same && i < dims; ++i) {
    empty |= sizes[i] == 0;
    same = sizes[i] == layout.sizes[i];
  }
  for (int64_t i = 0; same && !empty && i < dims; ++i) same = sizes[i] == 1 || strides[i] == layout.strides[i];
  if (!same)
    throw std::runtime_error(std::string(name) + " has the sizes and strides" + list(sizes, dims) + list(strides, dims) +
                             ", and the launches were recorded for" + list(layout.sizes.data(), layout.sizes.size()) +
                             list(layout.strides.data(), layout.strides.size()));
  return !empty;
}

CUtensorMap encode(const Map& map, uint64_t base) {
  CUtensorMap made;
  const std::vector<cuuint32_t> ones(map.shape.size(), 1);
  check(cuTensorMapEncodeTiled(&made, map.type, map.shape.size(), reinterpret_cast<void*>(base), map.shape.data(),
                               map.strides.data(), map.block.data(), ones.data(), CU_TENSOR_MAP_INTERLEAVE_NONE,
                               map.swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, map.fill),
        "describing a tensor");
  return made;
}

// The launches go to the context of this thread, which has none before it has used the GPU.
void enter(int device) {
  CUcontext context = nullptr;
  check(cuCtxGetCurrent(&context), "reading the device");
  CUdevice current = 0;
  if (!context) {
    check(cuDeviceGet(&current, device), "reading the device");
    check(cuDevicePrimaryCtxRetain(&context, current), "using the device");
    check(cuCtxSetCurrent(context), "using the device");
  }
  check(cuCtxGetDevice(&current), "reading the device");
  if (current != device)
    throw std::runtime_error("the inputs are on cuda:" + std::to_string(device) + ", and the package runs on cuda:" +
                             std::to_string(current) + "; load it for the inputs' device");
}

// A cooperative launch needs all its programs at a time: one for each multiprocessor.
void expect_multiprocessors(const Launch& step) {
  CUdevice device;
  int count = 0;
  check(cuCtxGetDevice(&device), "reading the device");
  check(cuDeviceGetAttribute(&count, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device), "reading the device");
  if (static_cast<unsigned>(count) < step.x)
    throw std::runtime_error("the package was made on a GPU with " + std::to_string(step.x) +
                             " multiprocessors, and this one has " + std::to_string(count) + "; export it on this one");
}

void launch(const Launch& step, CUfunction run, const std::vector<uint64_t>& places,
            const std::vector<CUtensorMap>& maps, CUstream stream) {
  const Kernel& kernel = kernels()[step.kernel];
  if (kernel.cooperative) expect_multiprocessors(step);
  std::vector<uint64_t> values(step.arguments.size() + 1, 0);  // one more: Triton's own scratch memory, which is not used
  std::vector<void*> parameters;
  for (size_t i = 0; i < step.arguments.size(); ++i) {
    const Argument& argument = step.arguments[i];
    if (argument.kind == Argument::MAP) {
      parameters.push_back(const_cast<CUtensorMap*>(&maps[argument.value]));
      continue;
    }
    values[i] = argument.kind == Argument::PLACE ? places[argument.value] : argument.value;
    parameters.push_back(&values[i]);
  }
  parameters.insert(parameters.end(), 2, &values.back());
  CUlaunchAttribute attribute = {};
  attribute.id = CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
  attribute.value.cooperative = 1;
  CUlaunchConfig config = {};
  config.gridDimX = step.x;
  config.gridDimY = step.y;
  config.gridDimZ = step.z;
  config.blockDimX = kernel.threads;
  config.blockDimY = config.blockDimZ = 1;
  config.sharedMemBytes = kernel.shared;
  config.hStream = stream;
  config.attrs = &attribute;
  config.numAttrs = kernel.cooperative;
  check(cuLaunchKernelEx(&config, run, parameters.data(), nullptr), kernel.name);
}

struct Input {
  const char* name;
  AtenTensorHandle tensor;
};

void replay(int64_t number, const std::vector<Input>& inputs, const std::vector<AtenTensorHandle*>& results) {
  const Plan& plan = plans().at(number);
  int32_t device = 0;
  void* stream = nullptr;
  check(aoti_torch_get_device_index(inputs[0].tensor, &device), "reading a device");
  check(aoti_torch_get_current_cuda_stream(device, &stream), "reading the stream");
  enter(device);
  std::vector<uint64_t> areas;
  std::vector<Tensor> copies;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const bool full = expect(inputs[i].tensor, plan.inputs[i], inputs[i].name);
    areas.push_back(address(inputs[i].tensor));
    if (full && areas.back() % ALIGNMENT) {  // part of a larger tensor, from the middle of it
      copies.emplace_back(inputs[i].tensor);
      areas.back() = address(copies.back().handle);
    }
  }
  const auto bytes = [](int64_t count) { return Layout{aoti_torch_dtype_uint8(), {count}, {1}}; };
  std::vector<Tensor> made;
  made.emplace_back(bytes(plan.scratch), device);
  made.emplace_back(bytes(plan.zeros), device);
  for (const Layout& layout : plan.outputs) made.emplace_back(layout, device);
  for (const Tensor& tensor : made) areas.push_back(address(tensor.handle));
  const CUstream on = static_cast<CUstream>(stream);
  if (plan.zeros) check(cuMemsetD8Async(areas[inputs.size() + 1], 0, plan.zeros, on), "clearing memory");
  std::vector<uint64_t> places;
  for (const Place& place : plan.places) places.push_back(areas[place.area] + place.offset);
  std::vector<CUtensorMap> maps;
  for (const Map& map : plan.maps) maps.push_back(encode(map, places[map.place]));
  for (const Launch& step : plan.launches) launch(step, function(device, step.kernel), places, maps, on);
  for (size_t i = 0; i < results.size(); ++i) *results[i] = made[2 + i].release();
}

AOTITorchError guarded(int64_t plan, const std::vector<Input>& inputs, const std::vector<AtenTensorHandle*>& results) {
  try {
    replay(plan, inputs, results);
    return AOTI_TORCH_SUCCESS;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "VMoBA attention of the package: %s\n", error.what());
    return AOTI_TORCH_FAILURE;
  }
}

}  // namespace
}  // namespace vmoba_replay

extern "C" __attribute__((visibility("hidden"))) AOTITorchError aoti_torch_cuda_replay_select(
    AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle key_mask, int64_t, int64_t, int64_t plan,
    AtenTensorHandle* selected) {
  return vmoba_replay::guarded(plan, {{"q", q}, {"k", k}, {"key_mask", key_mask}}, {selected});
}

extern "C" __attribute__((visibility("hidden"))) AOTITorchError aoti_torch_cuda_replay_attention(
    AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, AtenTensorHandle selected, AtenTensorHandle key_mask,
    int64_t plan, AtenTensorHandle* out, AtenTensorHandle* lse) {
  return vmoba_replay::guarded(
      plan, {{"q", q}, {"k", k}, {"v", v}, {"selected", selected}, {"key_mask", key_mask}}, {out, lse});
}
