"""ONNX files: read, checked and run as torch operations, node by node."""
