from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import make_unet
from diffusers.models.upsampling import Upsample2D

from diffumask_fast.attention.call import UNetCall
from diffumask_fast.attention.unet import UNetWithMaps
from diffumask_fast.export.graphs import (
    OPSET,
    Exportable,
    exportable_decoder,
    exportable_unet,
    unet_factor,
    write_graph,
)
from diffumask_fast.export.limits import Limits

onnx = pytest.importorskip("onnx")
LIMITS = Limits((1, 8), (64, 128), (64, 128), 32, 8, 4, 77, 8, {"0": 1, "1": 2, "2": 4}, ("1", "2"))


def test_attention_stays_one_node_and_no_softmax_is_left(mini_engine):
    graph = onnx.load(mini_engine / "unet.onnx")
    kinds = Counter(node.op_type for node in graph.graph.node)
    assert kinds["Attention"] == 20 and kinds["Softmax"] == 0
    assert {entry.version for entry in graph.opset_import if entry.domain == ""} == {OPSET}


def test_inputs_and_outputs_are_named_by_level(mini_engine):
    graph = onnx.load(mini_engine / "unet.onnx").graph
    first = ["latents", "timestep", "encoder_hidden_states", "select"]
    assert [entry.name for entry in graph.input] == [*first, "prior.0", "prior.1", "prior.2"]
    levels = [f"{kind}.{key}" for kind in ("maps", "propagated") for key in "012"]
    assert [entry.name for entry in graph.output] == ["noise_pred", *levels]


def test_large_weights_stand_beside_the_graph(static_engine, mini_engine):
    assert (static_engine / "unet.onnx.data").stat().st_size > (static_engine / "unet.onnx").stat().st_size / 2
    assert not (mini_engine / "unet.onnx.data").exists()


def test_only_levels_of_the_limits_are_propagated():
    part = exportable_unet(UNetWithMaps(make_unet()), LIMITS)
    assert [name for name in part.names if "prior" in name] == ["prior.1", "prior.2"]
    assert part.outputs == ["noise_pred", "maps.0", "maps.1", "maps.2", "propagated.1", "propagated.2"]
    assert part.inputs["prior"]["1"].shape == (2, 8, 16)


def test_unconditional_rows_of_zeros_change_nothing():
    model = UNetWithMaps(make_unet())
    part = exportable_unet(model, LIMITS)
    inputs = dict(part.inputs)
    inputs["select"][:1] = 0
    noise_pred, *levels = part.module(**inputs)
    prior = {key: value[1:] for key, value in inputs["prior"].items()}
    first = (inputs["latents"], inputs["timestep"], inputs["encoder_hidden_states"])
    truth = model(UNetCall(*first, inputs["select"][1:], prior))
    assert torch.equal(noise_pred, truth[0])
    for value, wanted in zip(levels, [*truth[1].values(), *truth[2].values()], strict=True):
        assert torch.allclose(value[1:], wanted, atol=1e-6) and wanted.std() > 0


def test_the_factor_of_the_latents():
    assert unet_factor(make_unet()) == 4


def test_diffusers_is_as_it_was_after_a_failure(tmp_path):
    class Refusing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = unet

        def forward(self, latents):
            assert all("forward" in vars(module) for module in upsamplers)
            raise RuntimeError("not traceable")

    unet = make_unet()
    upsamplers = [module for module in unet.modules() if isinstance(module, Upsample2D)]
    broken = Exportable(Refusing(), {"latents": torch.zeros(2, 3)}, {"latents": None}, ["x"])
    with pytest.raises(Exception, match="not traceable"):
        write_graph(broken, tmp_path / "x.onnx", 0)
    assert upsamplers and not any("forward" in vars(module) for module in upsamplers)


def test_graphs_are_the_same_each_time_and_hold_no_paths(sd_parts, tmp_path):
    for name in ("a", "b"):
        write_graph(exportable_decoder(sd_parts["vae"], LIMITS, 4), tmp_path / name, 2**30)
    written = (tmp_path / "a").read_bytes()
    assert (
        written == (tmp_path / "b").read_bytes() and b".py" not in written and str(Path.home()).encode() not in written
    )


def test_exported_folders_hold_no_paths(mini_engine, static_engine):
    for path in (*mini_engine.iterdir(), *static_engine.iterdir()):
        assert b'.py"' not in path.read_bytes(), path
