"""The primitive operators a static graph is made of: each in PyTorch, and as the ONNX nodes it is exported to."""
