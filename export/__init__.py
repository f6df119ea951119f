"""Denoisers outside torch: a model written as ONNX and run by ONNX Runtime or TensorRT, called as UNetWithMaps is."""

from diffumask_fast.export.denoiser import ExportedDenoiser
from diffumask_fast.export.limits import Limits
from diffumask_fast.export.load import Engine, load_engine
from diffumask_fast.export.onnx_export import export_onnx
from diffumask_fast.export.tensorrt_build import export_tensorrt
from diffumask_fast.export.tensorrt_refit import refit_engine

__all__ = ["Engine", "ExportedDenoiser", "Limits", "export_onnx", "export_tensorrt", "load_engine", "refit_engine"]
