"""The backend `cuda`: CUDA kernels, each of which runs a whole model in one launch."""
