"""One ONNX graph in ONNX Runtime, its inputs and outputs torch tensors that are not copied."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from diffumask_fast.errors import DiffuMaskError

# ONNX's numbers of the element types
ELEMENTS = {torch.float32: 1, torch.int64: 7, torch.float16: 10, torch.bfloat16: 16}
TYPES = {
    "tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(bfloat16)": torch.bfloat16,
    "tensor(int64)": torch.int64,
}  # fmt: skip


def runtime() -> Any:
    """Return the module onnxruntime.

    Raises:
        DiffuMaskError: it is not installed, or broken.
    """
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise DiffuMaskError(
            f"ONNX Runtime cannot be imported ({error}): pip install 'diffumask-fast[onnx]', or onnxruntime-gpu for "
            "CUDA."
        ) from error


class Runs(Protocol):
    """What answers for a graph: `Session`, or `TensorRTSession`."""

    device: torch.device
    inputs: dict[str, torch.dtype]
    outputs: dict[str, torch.dtype]

    def run(self, inputs: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Run the graph; shapes are those of the outputs."""


class Session:
    """Run a graph on one device.

    Args:
        path: of the graph.
        device: a CPU or CUDA device.
        threads: on the CPU; None is as many as torch uses.

    Raises:
        DiffuMaskError: ONNX Runtime is missing, cannot use the device, or cannot run the graph.
    """

    def __init__(self, path: Path, device: torch.device, threads: int | None = None) -> None:
        ort = runtime()
        self.device = device
        self._stream: Any = None
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        providers = self._providers(ort)
        try:
            self._session = ort.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            cause = " ".join(str(error).split())[:200]
            raise DiffuMaskError(f"ONNX Runtime cannot run {path} on {device} ({cause}): export it again.") from error
        if device.type == "cuda" and "CUDAExecutionProvider" not in self._session.get_providers():
            raise DiffuMaskError(
                "ONNX Runtime cannot load the CUDA libraries that it was built for, and would draw on the CPU: install "
                "its CUDA and cuDNN (pip install 'onnxruntime-gpu[cuda,cudnn]'), or use --device cpu."
            )
        self.inputs = {entry.name: TYPES[entry.type] for entry in self._session.get_inputs()}
        self.outputs = {entry.name: TYPES[entry.type] for entry in self._session.get_outputs()}

    def _providers(self, ort: Any) -> list[Any]:
        if self.device.type == "cpu":
            return ["CPUExecutionProvider"]
        if "CUDAExecutionProvider" not in ort.get_available_providers():
            raise DiffuMaskError(
                "The onnxruntime that is installed has no CUDA: pip uninstall onnxruntime, then pip install "
                "onnxruntime-gpu, or use --device cpu."
            )
        ort.preload_dlls()
        # not the current one: ONNX Runtime takes the default stream, 0, for none and makes one that nothing waits for
        self._stream = torch.cuda.Stream(self.device)
        stream = {"user_compute_stream": str(self._stream.cuda_stream), "device_id": str(self.device.index or 0)}
        return [("CUDAExecutionProvider", stream), "CPUExecutionProvider"]

    def run(self, inputs: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Run the graph.

        Args:
            inputs: name -> tensor; brought to the device and the type of the graph where they differ.
            shapes: name -> shape of the outputs that are wanted.

        Returns:
            name -> tensor on the device, in the order of shapes.
        """
        binding = self._session.io_binding()
        kept = {name: inputs[name].to(self.device, dtype).contiguous() for name, dtype in self.inputs.items()}
        types = {name: self.outputs[name] for name in shapes}
        out = {name: torch.empty(*shapes[name], dtype=types[name], device=self.device) for name in shapes}
        where = (self.device.type, self.device.index or 0)
        for name, tensor in kept.items():
            binding.bind_input(name, *where, ELEMENTS[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        for name, tensor in out.items():
            binding.bind_output(name, *where, ELEMENTS[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        self._session.run_with_iobinding(binding)
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        return out
