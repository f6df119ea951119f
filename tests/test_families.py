import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import draw
from diffusers import FluxKontextPipeline, FluxPipeline, StableDiffusion3Pipeline
from PIL import Image
from test_generation import options, silent
from tiny_mmdit import new_pipe, save

from diffumask_fast import DiffuMaskPipeline
from diffumask_fast.attention.families import FAMILIES, denoising_model, family_of
from diffumask_fast.dataset.reader import read_rows
from diffumask_fast.dropin.command import run as run_dropin
from diffumask_fast.dropin.options import DropinOptions
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.export.onnx_export import export_onnx
from diffumask_fast.generation.generate import run_generate
from diffumask_fast.models.find import find_model
from diffumask_fast.models.loading import load_pipe
from diffumask_fast.models.scheduler import set_scheduler, try_scheduler

PROMPTS = ["a photo of a dog and a cat", "a red bus on the street"]
CLASSES = [["dog", "cat"], ["bus"]]
NAMES = pytest.mark.parametrize("name", ["sd3", "flux"])


@pytest.fixture(scope="module")
def folders(parts_of_sd3, parts_of_flux, tmp_path_factory):
    out = tmp_path_factory.mktemp("mmdit")
    kinds = {"sd3": (StableDiffusion3Pipeline, parts_of_sd3), "flux": (FluxPipeline, parts_of_flux)}
    return {name: save(new_pipe(*kind), out / name) for name, kind in kinds.items()}


def test_each_pipeline_has_its_family(tiny_sd, sd3, flux):
    pipes = (tiny_sd, sd3, flux)
    assert [family_of(pipe) for pipe in pipes] == list(FAMILIES)
    assert [denoising_model(pipe) for pipe in pipes] == [tiny_sd.unet, sd3.transformer, flux.transformer]
    assert [family.arguments[:2] for family in FAMILIES] == [
        ("sample", "timestep"), ("hidden_states", "encoder_hidden_states"), ("hidden_states", "encoder_hidden_states")
    ]  # fmt: skip
    assert [family.default_size(pipe) for family, pipe in zip(FAMILIES, pipes, strict=True)] == [
        (64, 64), (64, 64), (1024, 1024)
    ]  # fmt: skip
    with pytest.raises(DiffuMaskError, match="SimpleNamespace has no UNet and no transformer"):
        family_of(SimpleNamespace())


@NAMES
def test_the_pipeline_makes_masks_of_the_plain_images(request, name):
    pipe = request.getfixturevalue(name)
    asked = dict(height=64, width=96, num_images_per_prompt=2)
    plain = pipe(PROMPTS, generator=generators(4), num_inference_steps=3, output_type="np", **asked).images
    own = DiffuMaskPipeline.from_pipe(pipe)
    out = own(PROMPTS, CLASSES, seeds=[0, 1, 2, 3], num_inference_steps=3, output_type="np", **asked)
    assert np.array_equal(out.images, plain)
    assert out.masks.shape == (4, 64, 96) and out.class_maps.shape == (4, 2, 4, 6)
    assert [set(np.unique(mask)) <= {0, *ids} for mask, ids in zip(out.masks, out.class_ids, strict=True)] == [True] * 4
    assert out.maps["0"].shape == (4, 2, 24) and out.provenance["dtype"] == "float32"
    with pytest.raises(DiffuMaskError, match="width 72 is not a multiple of 16: use 64"):
        own(PROMPTS, CLASSES, height=64, width=72)


def test_a_pipeline_that_takes_an_image_first(parts_of_flux):
    own = DiffuMaskPipeline.from_pipe(new_pipe(FluxKontextPipeline, parts_of_flux))
    given = dict(image=Image.new("RGB", (96, 64), (200, 100, 50)), max_area=64 * 96, _auto_resize=False)
    out = own(PROMPTS[0], ["dog"], seeds=[0], num_inference_steps=2, height=64, width=96, **given)
    assert out.masks.shape == (1, 64, 96) and out.class_maps.shape == (1, 1, 4, 6)


def generators(num):
    return [torch.Generator().manual_seed(seed) for seed in range(num)]


@NAMES
def test_generate_writes_masks_of_a_folder(folders, tmp_path, name):
    run_generate(options(tmp_path / "out", folders[name], num=4, shard_size=2, size="64x96"), silent)
    rows = list(read_rows(tmp_path / "out", accepted_only=False))
    assert len(rows) == 4 and all(row.mask.shape == (64, 96) and row.mask.any() for row in rows)
    record = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert record["options"]["guidance_scale"] == {"sd3": 7.0, "flux": 3.5}[name]


def test_a_folder_without_t5(folders, sd3, tmp_path):
    sd3.text_encoder_3 = sd3.tokenizer_3 = None
    out = DiffuMaskPipeline.from_pretrained(save(sd3, tmp_path / "model"), device="cpu")(
        PROMPTS, CLASSES, seeds=[0, 1], num_inference_steps=2
    )
    assert out.masks.shape == (2, 64, 64) and isinstance(out.images[0], Image.Image)


@NAMES
def test_what_is_for_unets_is_refused(folders, tmp_path, name):
    folder = folders[name]
    for asked in ({"engine": "compile"}, {"attention": "xformers"}):
        [(what, value)] = asked.items()
        with pytest.raises(DiffuMaskError, match=rf"`{what}={value}` is for|xformers runs on CUDA alone"):
            DiffuMaskPipeline.from_pretrained(folder, device="cpu", **asked)
    with pytest.raises(DiffuMaskError, match="`engine=onnx` is for models with a UNet, and .*Pipeline has a transf"):
        export_onnx(folder, tmp_path / "engine")
    pipe = load_pipe(find_model(folder), torch.float32, torch.device("cpu"))
    with pytest.raises(DiffuMaskError, match="no scheduler ddim for this model, which has FlowMatchEulerDiscreteSch"):
        set_scheduler(pipe, "ddim")
    with pytest.raises(DiffuMaskError, match="the paper's program draws with a UNet"):
        run_dropin(
            DropinOptions(classes="dog", output=tmp_path / "out", image_number=1, model=str(folder), device="cpu")
        )


def test_dynamic_shifts_are_tried(folders):
    pipe = DiffuMaskPipeline.from_pretrained(folders["flux"], device="cpu")
    pipe.pipe.scheduler = type(pipe.pipe.scheduler)(use_dynamic_shifting=True)
    assert draw(pipe.pipe, PROMPTS[0], height=64, width=64).shape == (1, 64, 64, 3)
    try_scheduler(pipe.pipe, 3)
