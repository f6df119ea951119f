import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_generation import options, silent

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.export.load import load_engine
from diffumask_fast.generation.generate import run_generate
from diffumask_fast.pipeline import DiffuMaskPipeline

PROMPTS = ["a photo of a dog on the grass", "a photo of a car on the street"]
CLASSES = [["dog"], ["car"]]


def draw(model, engine_path=None, prompts=PROMPTS, **kwargs):
    engine = {"engine": "onnx", "engine_path": engine_path} if engine_path else {}
    pipe = DiffuMaskPipeline.from_pretrained(model, device="cpu", **engine)
    pipe.pipe.set_progress_bar_config(disable=True)
    settings = dict(seeds=[1, 2], num_inference_steps=4, output_type="np") | kwargs
    return pipe(prompts, CLASSES, **settings)


def assert_same(found, truth):
    """Images within rounding; masks with the same class ids, not empty, IoU of each class at least 0.99."""
    assert np.abs(found.images - truth.images).max() < 1e-3
    ids = set(np.unique(truth.masks)) - {0, 255}
    assert ids == set(np.unique(found.masks)) - {0, 255} and ids == {12, 7}
    for class_id in ids:
        both = (found.masks == class_id) & (truth.masks == class_id)
        either = (found.masks == class_id) | (truth.masks == class_id)
        assert 0 < both.sum() and both.sum() / either.sum() >= 0.99


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
@pytest.mark.parametrize("size", [(128, 128), (128, 160)])
def test_mini_draws_the_same_images_and_masks(mini_engine, guidance_scale, size):
    settings = dict(guidance_scale=guidance_scale, height=size[0], width=size[1])
    found = draw("mini", mini_engine, **settings)
    assert_same(found, draw("mini", **settings))
    assert found.provenance["engine"]["name"] == "onnx" and len(found.provenance["engine"]["sha256"]) == 64


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
def test_sdxl_draws_the_same_images_and_masks(sdxl_folder, sdxl_engine, guidance_scale):
    settings = dict(guidance_scale=guidance_scale, height=64, width=96)
    assert_same(draw(sdxl_folder, sdxl_engine, **settings), draw(sdxl_folder, **settings))


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
def test_a_static_engine_draws_the_same(tiny_folder, static_engine, guidance_scale):
    from diffumask_fast.attention.options import MapOptions

    settings = dict(guidance_scale=guidance_scale, height=64, width=96, maps=MapOptions(propagate="none"))
    assert_same(draw(tiny_folder, static_engine, **settings), draw(tiny_folder, **settings))


def test_the_engine_draws_without_the_weights_of_the_model(tiny_folder, static_engine, tmp_path):
    from diffumask_fast.attention.options import MapOptions

    settings = dict(height=64, width=96, maps=MapOptions(propagate="none"))
    truth = draw(tiny_folder, static_engine, **settings)
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    for weights in list(model.rglob("*.safetensors")):
        weights.unlink()
    shutil.rmtree(model / "unet")
    with pytest.raises(DiffuMaskError, match="half-written|no weights"):
        DiffuMaskPipeline.from_pretrained(model, device="cpu")
    found = draw(model, static_engine, **settings)
    assert np.array_equal(found.masks, truth.masks) and np.array_equal(found.images, truth.images)
    assert found.provenance["weights"] == truth.provenance["weights"]


def test_auto_batch_size_and_calls_respect_the_limits(tiny_folder, static_engine):
    pipe = DiffuMaskPipeline.from_pretrained(tiny_folder, engine="onnx", engine_path=static_engine, device="cpu")
    assert pipe.batch_size("auto") == 2
    with pytest.raises(DiffuMaskError, match="at most 2 images"):
        pipe(PROMPTS + PROMPTS[:1], CLASSES + CLASSES[:1], height=64, width=96)
    with pytest.raises(DiffuMaskError, match="width from 96 to 96"):
        pipe(PROMPTS, CLASSES)
    with pytest.raises(DiffuMaskError, match="cannot propagate maps at level 0.*`propagate=none`"):
        pipe(PROMPTS, CLASSES, height=64, width=96)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(engine="nonsense"), "no engine nonsense: use torch, compile, onnx or tensorrt"),
        (dict(engine_path=None), "`engine=onnx` needs `engine_path`"),
        (dict(dtype="fp16"), "works in fp32: leave `dtype` out, or export with `dtype=fp16`"),
        (dict(model="mini"), "other weights than"),
    ],
)
def test_what_does_not_fit_is_one_sentence(tiny_folder, static_engine, changes, words):
    settings = dict(model=tiny_folder, engine="onnx", engine_path=static_engine, device="cpu") | changes
    with pytest.raises(DiffuMaskError, match=words):
        load_engine(**settings)


def tensorrt(engine, folder, version):
    """Copy an engine's folder as one of TensorRT-RTX for compute capability 8.9."""
    shutil.copytree(engine, folder)
    path = folder / "engine.json"
    data = json.loads(path.read_text()) | {"engine": "tensorrt-rtx", "target": "8.9"}
    data["versions"]["tensorrt-rtx"] = version
    path.write_text(json.dumps(data))
    return folder


def test_a_tensorrt_engine_that_cannot_run_here_is_refused(tiny_folder, static_engine, tmp_path, monkeypatch):
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    other = tensorrt(static_engine, tmp_path / "engine", trt.__version__)
    with pytest.raises(DiffuMaskError, match="is an engine for tensorrt-rtx: use `engine=tensorrt`"):
        load_engine(tiny_folder, "onnx", other)
    with pytest.raises(DiffuMaskError, match="is an engine for onnx: use `engine=onnx`"):
        load_engine(tiny_folder, "tensorrt", static_engine)
    with pytest.raises(DiffuMaskError, match="compute capability 8.9 and there is none here.*`engine=torch`"):
        load_engine(tiny_folder, "tensorrt", other, device="cpu")
    old = tensorrt(static_engine, tmp_path / "old", "1.2.3")
    with pytest.raises(DiffuMaskError, match="built by tensorrt-rtx 1.2.3 and .* is installed: export the model again"):
        load_engine(tiny_folder, "tensorrt", old)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    with pytest.raises(DiffuMaskError, match=r"TensorRT-RTX cannot be imported.*pip install 'diffumask-fast\[onnx,"):
        load_engine(tiny_folder, "tensorrt", other)


def test_a_run_is_finished_only_with_the_engine_that_began_it(sdxl_folder, sdxl_engine, tmp_path):
    settings = options(tmp_path / "out", sdxl_folder, engine="onnx", engine_path=sdxl_engine)
    assert run_generate(settings, silent)["drawn"] == 6
    record = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert record["options"]["engine"] == "onnx" and len(record["options"]["engine_sha256"]) == 64
    assert "onnxruntime" in record["environment"] and str(tmp_path) not in json.dumps(record)
    with pytest.raises(DiffuMaskError, match="`engine` was onnx and is torch now"):
        run_generate(options(tmp_path / "out", sdxl_folder), silent)
    assert run_generate(settings, silent)["drawn"] == 0


def test_a_run_outside_the_limits_writes_nothing(sdxl_folder, sdxl_engine, tmp_path):
    engine = dict(engine="onnx", engine_path=sdxl_engine)
    for changes, words in ((dict(batch_size="5"), "at most 4 images"), (dict(size="64x32"), "width from 64")):
        with pytest.raises(DiffuMaskError, match=words):
            run_generate(options(tmp_path / "out", sdxl_folder, **engine | changes), silent)
    assert not (tmp_path / "out").exists()


def test_auto_device_is_what_the_runtime_can_use():
    from diffumask_fast.export.load import _onnx_device

    no_cuda = SimpleNamespace(get_available_providers=lambda: ["CPUExecutionProvider"])
    assert _onnx_device("auto", no_cuda) == _onnx_device(None, no_cuda) == torch.device("cpu")
