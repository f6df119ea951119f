"""Denoisers outside torch: a model written as ONNX, and run by ONNX Runtime with the signature of UNetWithMaps."""

from diffumask_fast.export.limits import Limits
from diffumask_fast.export.load import Engine, load_engine
from diffumask_fast.export.onnx_denoiser import OnnxDenoiser
from diffumask_fast.export.onnx_export import export_onnx

__all__ = ["Engine", "Limits", "OnnxDenoiser", "export_onnx", "load_engine"]
