"""The node `TokenReduce` as a TensorRT plugin: C++ around the compiled Triton kernels, linked to neither TensorRT nor CUDA."""
