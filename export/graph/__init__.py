"""The static graph: modules that are traced, passes over the ONNX graph, checks and the export itself."""
