"""One ONNX graph in ONNX Runtime, its inputs and outputs torch tensors that are not copied."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from diffumask_fast.errors import DiffuMaskError, in_one_line

# The numbers that ONNX gives the element types.
ELEMENTS = {torch.float32: 1, torch.int64: 7, torch.float16: 10, torch.bfloat16: 16}
TYPES = {
    "tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(bfloat16)": torch.bfloat16,
    "tensor(int64)": torch.int64,
}  # fmt: skip

# Both install the module onnxruntime, so removing one of them breaks the other.
PACKAGES = ("onnxruntime", "onnxruntime-gpu")
REMOVE = f"pip uninstall -y {' '.join(PACKAGES)}"
INSTALL = "pip install 'diffumask-fast[onnx]', for CUDA 'diffumask-fast[gpu]'"


def runtime() -> Any:
    """Return the module onnxruntime.

    Raises:
        DiffuMaskError: it is not installed, or broken.
    """
    try:
        module = importlib.import_module("onnxruntime")
        module.InferenceSession  # noqa: B018 - a half-removed package still imports
        return module
    except (ImportError, AttributeError) as error:
        advice = f"{REMOVE}, then {INSTALL}" if installed() else INSTALL
        raise DiffuMaskError(f"ONNX Runtime cannot be imported ({error}): {advice}.") from error


def installed() -> list[str]:
    """Return which of PACKAGES are installed; two are one too many."""
    return [name for name in PACKAGES if any(metadata.distributions(name=name))]


def extra() -> str:
    """Return the extra that has the installed ONNX Runtime, so that our advice does not install a second one."""
    return "gpu" if "onnxruntime-gpu" in installed() else "onnx"


class GraphSession(Protocol):
    """A graph that is loaded and can be run: an `OnnxSession` or a `TensorRTSession`."""

    device: torch.device
    inputs: dict[str, torch.dtype]
    outputs: dict[str, torch.dtype]

    def run(self, inputs: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Run the graph; `shapes` are those of the outputs."""


class OnnxSession:
    """Run an ONNX graph on one device.

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
            cause = in_one_line(error)
            advice = "export it again" if len(installed()) < 2 else f"{REMOVE}, then {INSTALL}"
            raise DiffuMaskError(f"ONNX Runtime cannot run {path} on {device} ({cause}): {advice}.") from error
        if device.type == "cuda" and "CUDAExecutionProvider" not in self._session.get_providers():
            raise DiffuMaskError(
                "ONNX Runtime cannot load the CUDA libraries that it was built for, and would draw on the CPU: install "
                "its CUDA and cuDNN (pip install 'onnxruntime-gpu[cuda,cudnn]'), or use `device=cpu`."
            )
        self.inputs = {entry.name: TYPES[entry.type] for entry in self._session.get_inputs()}
        self.outputs = {entry.name: TYPES[entry.type] for entry in self._session.get_outputs()}

    def _providers(self, ort: Any) -> list[Any]:
        if self.device.type == "cpu":
            return ["CPUExecutionProvider"]
        if "CUDAExecutionProvider" not in ort.get_available_providers():
            raise DiffuMaskError(
                f"The onnxruntime that is installed has no CUDA: {REMOVE}, then pip install 'diffumask-fast[gpu]', or "
                "use `device=cpu`."
            )
        ort.preload_dlls()
        # A stream of our own: ONNX Runtime takes the default stream, 0, for "none given" and makes one that torch
        # does not wait for.
        self._stream = torch.cuda.Stream(self.device)
        stream = {"user_compute_stream": str(self._stream.cuda_stream), "device_id": str(self.device.index or 0)}
        return [("CUDAExecutionProvider", stream), "CPUExecutionProvider"]

    def run(self, inputs: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Run the graph.

        Args:
            inputs: name -> tensor; converted to the device and the dtype of the graph where they differ.
            shapes: name -> shape of the wanted outputs.

        Returns:
            name -> tensor on the device, in the order of shapes.
        """
        binding = self._session.io_binding()
        given = {name: inputs[name].to(self.device, dtype).contiguous() for name, dtype in self.inputs.items()}
        out = {
            name: torch.empty(*shape, dtype=self.outputs[name], device=self.device) for name, shape in shapes.items()
        }
        device = (self.device.type, self.device.index or 0)
        for bind, tensors in ((binding.bind_input, given), (binding.bind_output, out)):
            for name, tensor in tensors.items():
                bind(name, *device, ELEMENTS[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        self._session.run_with_iobinding(binding)
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        return out
