"""Export a rewritten Wan: an ONNX file, a TensorRT-RTX engine, and on a GPU a package that runs without Python.

    python examples/export_wan.py --out wan

The weights are random, so that this runs anywhere. For real ones put in place of ``preset(...)``:

    model = WanTransformer3DModel.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", subfolder="transformer")
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch

import vmoba_compile
from vmoba_compile.zoo import preset

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="tiny-wan", help="a name of vmoba_compile.zoo")
parser.add_argument("--layers", type=int, default=3)
parser.add_argument("--out", type=Path, default=Path("wan"), help="files are <out>.onnx, <out>.engine, <out>.pt2")
options = parser.parse_args()

torch.manual_seed(0)
model, inputs = preset(options.model).build(device="cpu", batch=2, num_layers=options.layers)
# min_tokens=0: the tiny model's sequence is far below the length from which sparse attention is faster.
config = vmoba_compile.VMoBAConfig(min_tokens=0)

# Runs in ONNX Runtime as it is, for any batch; the error printed is against PyTorch on these inputs.
onnx = vmoba_compile.export_onnx(
    model, (), inputs, options.out.with_suffix(".onnx"), config=config, dynamic_batch=True, expect=options.layers
)
print(onnx)

if find_spec("tensorrt_rtx"):  # builds without a GPU
    print(vmoba_compile.build_engine(onnx.path, options.out.with_suffix(".engine"), dynamic=onnx.ranges(1, 2, 4)))
else:
    print("no engine: pip install tensorrt_rtx")

if torch.cuda.is_available():  # holds the Triton kernels; see examples/package_cpp for loading it from C++
    inputs = {name: x.cuda() for name, x in inputs.items()}
    path = options.out.with_suffix(".pt2")
    package = vmoba_compile.export_package(model.cuda(), (), inputs, path, config=config, verify=True)
    print(f"{package.path}: {len(package.kernels)} Triton kernels inside, error {package.error:.1e}")
else:
    print("no package: it is for the GPU that the model is on, and there is none")
