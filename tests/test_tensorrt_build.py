import shutil
import sys

import pytest
import torch

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.export.graphs import decode_call, write_graph
from diffumask_fast.export.manifest import read_manifest
from diffumask_fast.export.tensorrt_build import build_plan, builder_library, export_rtx, find_target, profile_shapes

trt = pytest.importorskip("tensorrt_rtx_bindings")


def test_a_graph_is_built_without_a_gpu(mini_engine, sd_parts, tmp_path):
    import copy

    limits, vae = read_manifest(mini_engine).limits, torch.nn.Module.to(copy.deepcopy(sd_parts["vae"]), torch.float16)
    write_graph(decode_call(vae, limits, 4), tmp_path / "vae.onnx", 2**30)
    plan = build_plan(trt, tmp_path / "vae.onnx", limits, find_target(trt, "8.9"), decompose=False)
    assert len(plan) > 10_000
    assert trt.Runtime(trt.Logger()).deserialize_cuda_engine(plan[:100]) is None


def test_attention_in_fp32_is_built_decomposed_and_refused_otherwise(mini_engine):
    limits, target = read_manifest(mini_engine).limits, find_target(trt, "8.9")
    graph = mini_engine / "text_encoder.onnx"
    assert len(build_plan(trt, graph, limits, target, decompose=True)) > 10_000


def test_shapes_of_the_profile(mini_engine):
    limits = read_manifest(mini_engine).limits
    assert profile_shapes("latents", (-1, 4, -1, -1), limits) == ((1, 4, 16, 16), (8, 4, 32, 32))
    assert profile_shapes("prior.1", (-1, 8, -1), limits) == ((1, 8, 64), (8, 8, 256))
    assert profile_shapes("select", (-1, 77, 8), limits) == ((1, 77, 8), (8, 77, 8))


def test_a_gpu_that_it_does_not_know_is_refused_before_anything_is_exported(tmp_path):
    for wrong in ("9.0", "CURRENT", "sm_89", ""):
        with pytest.raises(DiffuMaskError, match="it knows 7.5, 8.0, 8.6, 8.9.*--to onnx"):
            export_rtx("mini", tmp_path / "out", compute_capability=wrong)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_graph_is_refused(mini_engine, tmp_path):
    (tmp_path / "unet.onnx").write_bytes(b"nonsense")
    with pytest.raises(DiffuMaskError, match="cannot read unet.onnx"):
        build_plan(trt, tmp_path / "unet.onnx", read_manifest(mini_engine).limits, find_target(trt, "8.9"), False)


def test_a_missing_library_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    with pytest.raises(DiffuMaskError, match=r"pip install 'diffumask-fast\[onnx,tensorrt-rtx\]'"):
        builder_library()
    with pytest.raises(DiffuMaskError, match="TensorRT-RTX cannot be imported"):
        export_rtx("mini", tmp_path / "out")


@pytest.mark.slow
def test_mini_is_built_whole_and_says_that_it_was_never_run(tmp_path):
    manifest = export_rtx("mini", tmp_path / "out", max_batch=2, compute_capability="8.9")
    assert read_manifest(tmp_path / "out") == manifest
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".engine"] * 3 + [".json"] * 4
    assert set(manifest.checked.values()) == {"built for compute capability 8.9, never run"}
    assert (tmp_path / "out" / "unet.engine").stat().st_size > 10**7
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    shutil.rmtree(tmp_path / "out")
