// Runs a package of vmoba_compile.export_package: no Python, no Triton, no vmoba_compile.
//
//   run_package model.pt2 inputs.pt output.pt [repeats]
//
// inputs.pt holds the tensors that the model takes, as torch.save writes a list of them: in Python
//   leaves = torch.utils._pytree.tree_leaves((args, kwargs))
//   torch.save([x.cpu() for x in leaves if isinstance(x, torch.Tensor)], "inputs.pt")
// output.pt is a tuple of the results, for torch.load. With repeats it prints the median milliseconds of a call.

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

std::vector<at::Tensor> read_tensors(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const c10::IValue value = torch::pickle_load(bytes);
  if (value.isTensorList()) return value.toTensorVector();
  std::vector<at::Tensor> tensors;
  for (const c10::IValue& item : value.toListRef()) tensors.push_back(item.toTensor());
  return tensors;
}

void write_tensors(const std::string& path, const std::vector<at::Tensor>& tensors) {
  std::vector<c10::IValue> on_cpu;
  for (const at::Tensor& tensor : tensors) on_cpu.emplace_back(tensor.cpu());
  const std::vector<char> bytes = torch::pickle_save(c10::ivalue::Tuple::create(std::move(on_cpu)));
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!file) throw std::runtime_error("cannot write " + path);
}

void run(const std::string& package, const std::string& inputs_path, const std::string& output_path, int repeats) {
  const c10::InferenceMode inference;
  const bool on_gpu = torch::cuda::is_available();
  torch::inductor::AOTIModelPackageLoader loader(package);
  std::vector<at::Tensor> inputs = read_tensors(inputs_path);
  if (on_gpu)
    for (at::Tensor& input : inputs) input = input.cuda();
  const auto call = [&] {
    std::vector<at::Tensor> outputs = loader.run(inputs);
    if (on_gpu) torch::cuda::synchronize();
    return outputs;
  };
  write_tensors(output_path, call());
  std::vector<double> times;
  for (int i = 0; i < repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    call();
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
    times.push_back(took.count());
  }
  if (times.empty()) return;
  std::nth_element(times.begin(), times.begin() + repeats / 2, times.end());
  std::cout << "median of " << repeats << " calls: " << times[repeats / 2] << " ms" << std::endl;
}

}  // namespace

int main(int count, char** words) {
  if (count != 4 && count != 5) {
    std::cerr << "usage: run_package model.pt2 inputs.pt output.pt [repeats]\n";
    return 2;
  }
  try {
    run(words[1], words[2], words[3], count == 5 ? std::stoi(words[4]) : 0);
  } catch (const std::exception& error) {
    std::cerr << "run_package: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
