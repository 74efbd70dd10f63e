"""Everything that runs a graph: ONNX Runtime, TensorRT, PyTorch, and the choice between them by measurement."""
