"""Artefacts for serving: ONNX files, TensorRT engines, ahead-of-time compiled packages."""
