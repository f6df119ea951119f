"""What can be said of code that only a GPU runs: what it calls is there, and what the GPU runs when there is one."""

import ast
import inspect

import pytest
import torch

from diffumask_fast.export import tensorrt_build, tensorrt_refit, tensorrt_session

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
    tensorrt_refit: {"parser": trt.OnnxParserRefitter},
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


@pytest.mark.gpu
def test_an_engine_gives_what_torch_gives(tmp_path):
    """TensorRT-RTX where it runs on the card, else TensorRT where it is installed."""
    from diffumask_fast.errors import DiffuMaskError
    from diffumask_fast.export.tensorrt_build import export_tensorrt
    from diffumask_fast.pipeline import DiffuMaskPipeline

    reasons = []
    for flavour in ("tensorrt-rtx", "tensorrt"):
        try:
            export_tensorrt("mini", tmp_path / flavour, flavour=flavour, max_batch=2)
        except DiffuMaskError as error:
            reasons.append(str(error))
            continue
        drawn = []
        for engine in (dict(engine="tensorrt", engine_path=tmp_path / flavour), dict(dtype="fp16")):
            pipe = DiffuMaskPipeline.from_pretrained("mini", device="cuda", **engine)
            for _ in range(2):  # the second call replays the graph
                out = pipe(["a photo of a dog on the grass"], [["dog"]], seeds=[1], num_inference_steps=4)
            drawn.append(torch.from_numpy(out.masks) == 12)
        both, either = (drawn[0] & drawn[1]).sum(), (drawn[0] | drawn[1]).sum()
        assert both > 0 and both / either >= 0.95
        return
    pytest.skip("; ".join(reasons))
