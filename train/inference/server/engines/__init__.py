"""What computes for the server: a model as jax has it, or a file for ONNX Runtime."""
