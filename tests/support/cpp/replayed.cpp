// The runtime of recorded launches with a driver and tensors that do nothing but tell what they are asked for.
#include "driver.hpp"
#include "plans.hpp"

struct Fake {
  std::vector<int64_t> sizes, strides;
  int32_t dtype;
  uint64_t address;
};

namespace {
uint64_t next_address = 0x10000;
Fake* of(AtenTensorHandle tensor) { return reinterpret_cast<Fake*>(tensor); }
}  // namespace

extern "C" {
int32_t aoti_torch_device_type_cuda() { return 1; }
int32_t aoti_torch_dtype_uint8() { return 0; }
int32_t aoti_torch_dtype_int32() { return 3; }
int32_t aoti_torch_dtype_float32() { return 6; }
int32_t aoti_torch_dtype_bool() { return 11; }
int32_t aoti_torch_dtype_bfloat16() { return 15; }
AOTITorchError aoti_torch_get_dim(AtenTensorHandle x, int64_t* to) { return *to = of(x)->sizes.size(), 0; }
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle x, int32_t* to) { return *to = of(x)->dtype, 0; }
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle x, int64_t** to) { return *to = of(x)->sizes.data(), 0; }
AOTITorchError aoti_torch_get_strides(AtenTensorHandle x, int64_t** to) { return *to = of(x)->strides.data(), 0; }
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t* to) { return *to = 1, 0; }
AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle x, void** to) {
  return *to = reinterpret_cast<void*>(of(x)->address), 0;
}
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** to) { return *to = nullptr, 0; }
AOTITorchError aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                        int32_t, int32_t device, AtenTensorHandle* to) {
  Fake* made = new Fake{{sizes, sizes + dims}, {strides, strides + dims}, dtype, next_address += 0x10000};
  std::printf("allocate %ld on %d\n", static_cast<long>(dims ? sizes[0] : 1), device);
  return *to = reinterpret_cast<AtenTensorHandle>(made), 0;
}
AOTITorchError aoti_torch_clone_preserve_strides(AtenTensorHandle x, AtenTensorHandle* to) {
  Fake* made = new Fake(*of(x));
  made->address = next_address += 0x10000;
  std::printf("copy %#lx\n", static_cast<long>(of(x)->address));
  return *to = reinterpret_cast<AtenTensorHandle>(made), 0;
}
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle x) {
  std::printf("free %#lx\n", static_cast<long>(of(x)->address));
  return delete of(x), 0;
}
}

int main(int, char** words) {
  // Arguments: stride of a head of q, address of q, plan.
  Fake q{{1, 2, 6, 8}, {7, std::atol(words[1]), 8, 1}, 15, static_cast<uint64_t>(std::atol(words[2]))};
  Fake k{{1, 2, 6, 8}, {96, 48, 8, 1}, 15, 4096}, mask{{0}, {1}, 11, 1}, selected{{1, 2, 6, 1}, {12, 6, 1, 1}, 3, 8192};
  const auto handle = [](Fake& x) { return reinterpret_cast<AtenTensorHandle>(&x); };
  AtenTensorHandle out = nullptr, lse = nullptr;
  for (int turn = 0; turn < 2; ++turn) {
    const AOTITorchError status = aoti_torch_cuda_replay_attention(handle(q), handle(k), handle(k), handle(selected),
                                                                   handle(mask), std::atol(words[3]), &out, &lse);
    if (status) return 3;
    std::printf("out %#lx lse %#lx\n", static_cast<long>(of(out)->address), static_cast<long>(of(lse)->address));
  }
}
