import copy
import time
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from diffusers import UNet2DConditionModel

from diffumask_fast.attention.unet import UNetWithMaps
from diffumask_fast.bench.geometries import UNETS
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.export import plan_cache, tensorrt_build
from diffumask_fast.export.graphs import Exportable, exportable_decoder, exportable_unet, write_graph
from diffumask_fast.export.limits import Limits
from diffumask_fast.export.manifest import read_manifest
from diffumask_fast.export.onnx_export import level_divisors
from diffumask_fast.export.options import ShapeOptions
from diffumask_fast.export.tensorrt_build import build_plan, export_tensorrt, find_target, profile_shapes

trt = pytest.importorskip("tensorrt_rtx_bindings")
# the widest level of SDXL's attention, with its added conditions, one transformer block deep
SDXL_CUT = dict(
    sample_size=32, in_channels=4, out_channels=4, block_out_channels=(640,), layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), attention_head_dim=10,
    transformer_layers_per_block=1, cross_attention_dim=2048, use_linear_projection=True,
    addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
)  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "diffumask-fast" / "plans"


def nodes_of(path):
    onnx = pytest.importorskip("onnx")
    kinds = [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]
    return {kind: kinds.count(kind) for kind in set(kinds)}


def written(unet, path, latents, batch=2, sizes=1, propagated=None):
    """Write a UNet with maps in fp16; `sizes` is the most latents over the least."""
    divisors = level_divisors(unet)
    pixels = {key: (latents // divisor) ** 2 for key, divisor in divisors.items()}
    side = (8 * latents, 8 * latents * sizes)
    limits = Limits(
        rows=(1, 2 * batch), height=side, width=side, multiple=8 * max(divisors.values()), vae_factor=8, channels=4,
        tokens=77, max_phrases=8, divisors=divisors,
        propagated=tuple(key for key, num in pixels.items() if num <= 1024),
    )  # fmt: skip
    write_graph(exportable_unet(UNetWithMaps(unet.half(), impl="sdpa"), limits), path, 2**29)
    return limits


def test_a_graph_is_built_once_without_a_gpu(mini_engine, sd_parts, tmp_path, cache, monkeypatch):
    limits, vae = read_manifest(mini_engine).limits, torch.nn.Module.to(copy.deepcopy(sd_parts["vae"]), torch.float16)
    write_graph(exportable_decoder(vae, limits, 4), tmp_path / "vae.onnx", 2**30)
    plan = build_plan(trt, tmp_path / "vae.onnx", limits, "8.9")
    assert len(plan) > 10_000

    def refuse(*_):
        raise AssertionError("it is built again")

    monkeypatch.setattr(tensorrt_build, "_build", refuse)
    assert build_plan(trt, tmp_path / "vae.onnx", limits, "8.9") == plan
    for other in (dict(target="8.6"), dict(refittable=True), dict(decompose=True)):
        with pytest.raises(AssertionError):
            build_plan(trt, tmp_path / "vae.onnx", limits, **{"target": "8.9", **other})
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(AssertionError):
        build_plan(trt, tmp_path / "vae.onnx", limits, "8.9")


def test_a_refittable_engine_needs_a_gpu_which_is_said_first(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt_build, "local_capability", lambda: None)
    with pytest.raises(DiffuMaskError, match="refittable engine only where there is a GPU"):
        export_tensorrt("mini", tmp_path / "out", compute_capability="8.9", refittable=True)
    assert not (tmp_path / "out").exists()


def test_attention_in_fp32_is_built_decomposed_and_refused_otherwise(mini_engine, tmp_path):
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.project, self.back = torch.nn.Linear(64, 3 * 64), torch.nn.Linear(64, 64)

        def forward(self, x):
            q, k, v = self.project(x).unflatten(2, (3, 2, 32)).permute(2, 0, 3, 1, 4).unbind(0)
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return (self.back(out.transpose(1, 2).flatten(2)),)

    limits, graph = read_manifest(mini_engine).limits, tmp_path / "attention.onnx"
    write_graph(Exportable(Attention(), {"x": torch.randn(2, 64, 64)}, {"x": None}, ["out"]), graph, 2**30)
    assert nodes_of(graph)["Attention"] == 1
    assert len(build_plan(trt, graph, limits, "8.9", decompose=True)) > 1000
    with pytest.raises(DiffuMaskError, match="cannot build attention.onnx.*another `dtype`, or `to=onnx`"):
        build_plan(trt, graph, limits, "8.9")


def test_the_unet_of_mini_is_built_in_fp16_with_fused_attention(tmp_path):
    from diffumask_fast.models.find import find_model

    unet = UNet2DConditionModel.from_pretrained(find_model("mini").folder / "unet")
    limits = written(unet, tmp_path / "unet.onnx", 16, sizes=2)
    nodes = nodes_of(tmp_path / "unet.onnx")
    assert nodes["Attention"] == len(unet.attn_processors) and "Softmax" not in nodes
    assert len(build_plan(trt, tmp_path / "unet.onnx", limits, "8.9")) > 10**7


def test_one_level_of_sdxl_is_built_in_fp16(tmp_path):
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(SDXL_CUT)
    limits = written(unet, tmp_path / "unet.onnx", 32)
    nodes = nodes_of(tmp_path / "unet.onnx")
    assert nodes["Attention"] == len(unet.attn_processors) and "Softmax" not in nodes
    assert len(build_plan(trt, tmp_path / "unet.onnx", limits, "8.9")) > 10**7


def test_shapes_of_the_profile(mini_engine):
    limits = read_manifest(mini_engine).limits
    assert profile_shapes("latents", (-1, 4, -1, -1), limits) == ((1, 4, 16, 16), (8, 4, 32, 32))
    assert profile_shapes("prior.1", (-1, 8, -1), limits) == ((1, 8, 64), (8, 8, 256))
    assert profile_shapes("select", (-1, 77, 8), limits) == ((1, 77, 8), (8, 77, 8))


def test_fewer_images_than_a_static_engine_draws_are_decoded_too(mini_engine):
    static = replace(read_manifest(mini_engine).limits, rows=(4, 4), height=(64, 64), width=(96, 96))
    assert profile_shapes("latents", (-1, 4, 8, 12), static) == ((1, 4, 8, 12), (4, 4, 8, 12))
    assert profile_shapes("prior.1", (4, 8, -1), static) == ((4, 8, 24), (4, 8, 24))


def test_a_gpu_that_it_does_not_know_is_refused_before_anything_is_exported(tmp_path, monkeypatch):
    for wrong in ("9.0", "CURRENT", "sm_89"):
        with pytest.raises(DiffuMaskError, match="it knows 7.5, 8.0, 8.6, 8.9.*`to=onnx`"):
            export_tensorrt("mini", tmp_path / "out", compute_capability=wrong)
    monkeypatch.setattr(tensorrt_build, "local_capability", lambda: None)
    with pytest.raises(DiffuMaskError, match="no GPU here.*`compute_capability=8.9`"):
        export_tensorrt("mini", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "here, asked, words", [(None, None, "here is none"), ("9.0", "8.9", "of compute capability 9.0")]
)
def test_tensorrt_itself_builds_only_for_the_gpu_that_is_here(monkeypatch, here, asked, words):
    monkeypatch.setattr(tensorrt_build, "local_capability", lambda: here)
    with pytest.raises(DiffuMaskError, match=f"{words}.*`to=tensorrt-rtx`, which needs no GPU"):
        find_target(trt, "tensorrt", asked)


def test_the_gpu_that_is_here_is_the_default(monkeypatch):
    monkeypatch.setattr(tensorrt_build, "local_capability", lambda: "8.6")
    assert find_target(trt, "tensorrt-rtx", None) == find_target(trt, "tensorrt", None) == "8.6"
    assert find_target(trt, "tensorrt-rtx", "8.9") == "8.9"


def test_a_file_that_is_no_graph_is_refused(mini_engine, tmp_path):
    (tmp_path / "unet.onnx").write_bytes(b"nonsense")
    with pytest.raises(DiffuMaskError, match="cannot read unet.onnx"):
        build_plan(trt, tmp_path / "unet.onnx", read_manifest(mini_engine).limits, "8.9")


def test_the_cache_drops_what_was_used_longest_ago(cache, monkeypatch):
    monkeypatch.setattr(plan_cache, "MOST_BYTES", 300)
    for name in ("a", "b"):
        plan_cache.keep(name, name.encode() * 100)
        time.sleep(0.02)
    assert plan_cache.kept("a") == b"a" * 100
    time.sleep(0.02)
    plan_cache.keep("c", b"c" * 100)
    assert sorted(path.name for path in cache.iterdir()) == ["a", "c"]


def test_a_cache_that_cannot_be_kept_costs_the_cache_alone(cache):
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file in the place of the folder")
    plan_cache.keep("a", b"a")
    assert plan_cache.kept("a") is None


@pytest.mark.parametrize("accepted, used", [([True], [b"old"]), ([False, True], [b"old", b""])])
def test_timings_of_another_gpu_are_left_out(tmp_path, accepted, used):
    (tmp_path / "timings").write_bytes(b"old")
    config = Mock(spec=trt.IBuilderConfig)
    config.set_timing_cache.side_effect = accepted
    tensorrt_build._use_timings(config, tmp_path / "timings")
    assert [call.args[0] for call in config.create_timing_cache.call_args_list] == used
    assert config.set_timing_cache.call_count == len(accepted)


@pytest.mark.slow
def test_mini_is_built_whole_and_says_that_it_was_never_run(tmp_path):
    manifest = export_tensorrt("mini", tmp_path / "out", shapes=ShapeOptions(max_batch=2), compute_capability="8.9")
    assert read_manifest(tmp_path / "out") == manifest and manifest.engine == "tensorrt-rtx"
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".engine"] * 3 + [".json"] * 4
    assert set(manifest.checked.values()) == {"built for compute capability 8.9, never run"}
    assert (tmp_path / "out" / "unet.engine").stat().st_size > 10**7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out"]


@pytest.mark.slow
def test_stable_diffusion_is_built_in_fp16_with_fused_attention(tmp_path):
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(UNETS["sd15"])
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    limits = written(unet, tmp_path / "unet.onnx", 64, batch=8)
    nodes = nodes_of(tmp_path / "unet.onnx")
    assert nodes["Attention"] == 32 and "Softmax" not in nodes
    assert limits.propagated == ("1", "2", "3")
    assert len(build_plan(trt, tmp_path / "unet.onnx", limits, "8.9")) > 1.7e9
