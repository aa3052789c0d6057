"""Building TensorRT engines: the request, the process that builds, the sidecar."""
