"""What can be said of code that only a GPU runs: what it calls is there. test_gpu_engines.py runs it."""

import ast
import inspect
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.export import tensorrt_build, tensorrt_refit, tensorrt_session
from diffumask_fast.export.tensorrt_library import keeping_logger

trt = pytest.importorskip("tensorrt_rtx_bindings")
# name of a variable in the sources -> the class in the bindings that it is an instance of
CLASSES = {
    "runtime": trt.Runtime, "engine": trt.ICudaEngine, "context": trt.IExecutionContext, "config": None,
    "refitter": trt.Refitter, "parser": None, "builder": trt.Builder, "network": trt.INetworkDefinition,
    "profile": trt.IOptimizationProfile, "cache": trt.ITimingCache, "trt": trt,
}  # fmt: skip
OF_MODULE = {
    tensorrt_session: {"config": trt.IRuntimeConfig},
    tensorrt_build: {"config": trt.IBuilderConfig, "parser": trt.OnnxParser},
    tensorrt_refit: {"parser": trt.OnnxParserRefitter, "config": trt.ISerializationConfig},
}


def uses(module):
    """Yield (variable, attribute) of all that a module reads of the bindings' objects."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Attribute):
            owner = node.value
            name = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "").removeprefix("_")
            if name in CLASSES:
                yield name, node.attr


@pytest.mark.parametrize("module", OF_MODULE, ids=lambda module: module.__name__.rpartition(".")[2])
def test_all_that_is_called_is_in_the_bindings(module):
    classes = CLASSES | OF_MODULE[module]
    found = set(uses(module))
    assert len(found) > 4
    assert [(name, attr) for name, attr in sorted(found) if not hasattr(classes[name], attr)] == []


def test_a_call_that_is_not_in_the_bindings_would_be_found():
    assert not hasattr(trt.IExecutionContext, "execute_async_v2") and not hasattr(trt.ICudaEngine, "num_bindings")


def call_of(takes_shapes=True):
    """Prepare a call of an engine that only notes what it is asked for."""
    engine, context, config = (Mock(spec=kind) for kind in (trt.ICudaEngine, trt.IExecutionContext, trt.IRuntimeConfig))
    engine.create_runtime_config.return_value, engine.create_execution_context.return_value = config, context
    context.update_device_memory_size_for_shapes.return_value = 1000
    context.set_input_shape.return_value = takes_shapes
    stream = SimpleNamespace(device=torch.device("cpu"), cuda_stream=7, synchronize=lambda: None)
    given, taken = {"x": torch.zeros(2, 3)}, {"y": torch.empty(4)}
    return tensorrt_session._BoundContext(trt, engine, keeping_logger(trt), stream, given, taken), context, config


def test_a_call_of_rtx_gives_shapes_then_memory_for_them_then_addresses():
    call, context, config = call_of()
    call.launch()
    assert [(name, *args) for name, args, _ in context.method_calls] == [
        ("set_input_shape", "x", (2, 3)),
        ("update_device_memory_size_for_shapes",),
        ("set_device_memory", call._memory.data_ptr(), 1000),
        ("set_tensor_address", "x", call.inputs["x"].data_ptr()),
        ("set_tensor_address", "y", call.outputs["y"].data_ptr()),
        ("execute_async_v3", 7),
    ]
    assert call._memory.nbytes == 1000
    assert config.dynamic_shapes_kernel_specialization_strategy == trt.DynamicShapesKernelSpecializationStrategy.EAGER
    context.execute_async_v3.return_value = False
    with pytest.raises(DiffuMaskError, match="could not run .*smaller `batch_size`"):
        call.launch()


def test_another_thread_may_allocate_while_a_call_is_captured(monkeypatch):
    monkeypatch.setattr(tensorrt_session, "is_rtx", lambda _: False)
    monkeypatch.setattr(tensorrt_session.torch.cuda, "CUDAGraph", Mock)
    graph = Mock(return_value=nullcontext())
    monkeypatch.setattr(tensorrt_session.torch.cuda, "graph", graph)
    call, context, _ = call_of()
    assert graph.call_args.kwargs["capture_error_mode"] == "thread_local"
    assert context.execute_async_v3.call_count == 2  # once before the capture, once in it
    call.launch()
    assert context.execute_async_v3.call_count == 2 and call._graph.replay.call_count == 1


def test_a_shape_that_the_engine_refuses_is_named():
    with pytest.raises(DiffuMaskError, match=r"takes no x of \[2, 3\]"):
        call_of(takes_shapes=False)
