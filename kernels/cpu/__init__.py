"""The node `TokenReduce` on a CPU: one C++ core, as an extension of OpenVINO and as a custom operator of ONNX Runtime."""
