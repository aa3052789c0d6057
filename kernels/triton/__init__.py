"""The node `TokenReduce` on a GPU: four Triton kernels, the call of them from PyTorch, and their compilation ahead of time."""
