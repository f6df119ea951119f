"""Denoisers outside torch: a model written as ONNX and run by ONNX Runtime or TensorRT, called as UNetWithMaps is."""
