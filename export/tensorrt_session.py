"""One engine of TensorRT or TensorRT-RTX, its inputs and outputs torch tensors. Written against the signatures of
TensorRT-RTX 1.7.1; no GPU has run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.export.tensorrt_library import is_rtx, keeping_logger, words_of

MAX_CONTEXTS = 2  # each holds memory of its own; a call of new shapes drops the oldest
SMALLER = "use a smaller `batch_size` or `size`"


class TensorRTSession:
    """Run an engine on one GPU, with one CUDA graph for each set of shapes.

    Args:
        trt: the module that built it.
        path: of the engine.
        device: a CUDA device.

    Raises:
        DiffuMaskError: the library cannot load it.
    """

    def __init__(self, trt: Any, path: Path, device: torch.device) -> None:
        self.device = device
        self._trt = trt
        self._logger = keeping_logger(trt)
        self._stream = torch.cuda.Stream(device)
        self._contexts: dict[tuple[tuple[int, ...], ...], _BoundContext] = {}
        with torch.cuda.device(device):
            runtime = trt.Runtime(self._logger)
            engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise DiffuMaskError(f"TensorRT cannot load {path} ({words_of(self._logger)}): export the model again.")
        self._runtime, self._engine = runtime, engine
        types = {
            trt.DataType.FLOAT: torch.float32, trt.DataType.HALF: torch.float16, trt.DataType.BF16: torch.bfloat16,
            trt.DataType.INT64: torch.int64,
        }  # fmt: skip
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        given = {name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
        self.inputs = {name: types[engine.get_tensor_dtype(name)] for name in names if name in given}
        self.outputs = {name: types[engine.get_tensor_dtype(name)] for name in names if name not in given}

    def run(self, inputs: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Run the engine, in the order of torch's current stream.

        Args:
            inputs: name -> tensor; converted to the device and the dtype of the engine where they differ.
            shapes: name -> shape of every output.

        Returns:
            name -> tensor on the device, in the order of shapes.

        Raises:
            DiffuMaskError: the library refuses the shapes or the call.
        """
        key = tuple(tuple(inputs[name].shape) for name in self.inputs)
        current = torch.cuda.current_stream(self.device)
        # On the default stream TensorRT would synchronise the whole device.
        self._stream.wait_stream(current)
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            bound = self._contexts.pop(key, None) or self._bind(inputs, shapes)
            self._contexts[key] = bound
            for name, own in bound.inputs.items():
                own.copy_(inputs[name])
            bound.launch()
            out = {name: bound.outputs[name].clone() for name in shapes}
        current.wait_stream(self._stream)
        for tensor in out.values():
            tensor.record_stream(current)
        return out

    def _bind(self, inputs: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> _BoundContext:
        while len(self._contexts) >= MAX_CONTEXTS:
            torch.cuda.synchronize(self.device)
            self._contexts.pop(next(iter(self._contexts)))
        try:
            with self.device:
                own_inputs = {n: torch.zeros(inputs[n].shape, dtype=dtype) for n, dtype in self.inputs.items()}
                own_outputs = {n: torch.empty(*shapes[n], dtype=dtype) for n, dtype in self.outputs.items()}
            return _BoundContext(self._trt, self._engine, self._logger, self._stream, own_inputs, own_outputs)
        except torch.OutOfMemoryError as error:
            raise DiffuMaskError(f"The GPU's memory is too small for this call: {SMALLER}.") from error


class _BoundContext:
    """An execution context for one set of shapes; its tensors are its own, so that its CUDA graph stays valid."""

    def __init__(
        self,
        trt: Any,
        engine: Any,
        logger: Any,
        stream: torch.cuda.Stream,
        inputs: dict[str, Tensor],
        outputs: dict[str, Tensor],
    ) -> None:
        self.inputs, self.outputs = inputs, outputs
        self._logger, self._stream = logger, stream
        self._graph: torch.cuda.CUDAGraph | None = None
        own_graph = is_rtx(trt)
        # By default the library allocates what the profile's largest shapes need, whatever the shapes of the call.
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if own_graph:
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            # With lazy specialization other kernels take over in the middle of a run, at a time that the clock decides.
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            context = engine.create_execution_context(runtime_config=config)
        else:
            context = engine.create_execution_context(strategy=strategy)
        if context is None:
            raise DiffuMaskError(f"TensorRT cannot start ({words_of(logger)}): {SMALLER}.")
        self._context = context
        for name, tensor in inputs.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise DiffuMaskError(
                    f"The engine takes no {name} of {list(tensor.shape)} ({words_of(logger)}): export the model again "
                    "with other limits."
                )
        size = context.update_device_memory_size_for_shapes()
        self._memory = torch.empty(size, dtype=torch.uint8, device=stream.device)
        context.set_device_memory(self._memory.data_ptr(), size)
        for name, tensor in (inputs | outputs).items():
            context.set_tensor_address(name, tensor.data_ptr())
        if not own_graph:
            self._capture()

    def launch(self) -> None:
        """Start the call on the stream."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self._enqueue()

    def _capture(self) -> None:
        self._enqueue()  # the first call allocates memory, which cannot be captured
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # thread_local: work of another thread on its own stream does not break the capture.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._enqueue()
        self._graph = graph

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise DiffuMaskError(f"TensorRT could not run ({words_of(self._logger)}): {SMALLER}.")
