"""Schedules, reducers, the static ViT, tracing to ONNX, graph checks and provenance."""
