import pytest
import torch
from conftest import relative

from diffumask_fast.attention.call import UNetCall
from diffumask_fast.attention.unet import UNetWithMaps
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.export.check import random_inputs
from diffumask_fast.export.denoiser import ExportedDenoiser
from diffumask_fast.export.manifest import read_manifest
from diffumask_fast.export.session import OnnxSession
from diffumask_fast.models.find import find_model
from diffumask_fast.models.loading import load_pipe

CPU = torch.device("cpu")


def denoiser_of(folder):
    return ExportedDenoiser(OnnxSession(folder / "unet.onnx", CPU), read_manifest(folder).limits)


@pytest.fixture(scope="module")
def pairs(mini_engine, sdxl_engine, static_engine, sd_parts, sdxl_parts):
    mini = load_pipe(find_model("mini"), torch.float32, CPU).unet
    return {
        "mini": (denoiser_of(mini_engine), UNetWithMaps(mini)),
        "sdxl": (denoiser_of(sdxl_engine), UNetWithMaps(sdxl_parts["unet"])),
        "static": (denoiser_of(static_engine), UNetWithMaps(sd_parts["unet"])),
    }


@pytest.fixture
def static(pairs):
    return pairs["static"]


def assert_equal(found, truth):
    assert relative(found[0], truth[0]) < 1e-4
    for value, wanted in zip(found[1:], truth[1:], strict=True):
        assert list(value) == list(wanted)
        for key in wanted:
            assert value[key].shape == wanted[key].shape and value[key].dtype == torch.float32
            assert relative(value[key], wanted[key]) < 1e-4
            assert wanted[key].std() > 0


@pytest.mark.parametrize(
    "kind, rows, conditional, size",
    [
        ("mini", 2, 1, (128, 128)),
        ("mini", 6, 3, (160, 128)),
        ("mini", 1, 1, (128, 192)),
        ("mini", 8, 4, (256, 256)),
        ("sdxl", 2, 1, (64, 64)),
        ("sdxl", 6, 3, (64, 96)),
        ("sdxl", 5, 5, (128, 96)),
        ("static", 4, 2, (64, 96)),
        ("static", 4, 4, (64, 96)),
        ("static", 2, 1, (64, 96)),
        ("static", 1, 1, (64, 96)),
    ],
)
@torch.no_grad()
def test_onnx_gives_what_torch_gives(pairs, kind, rows, conditional, size):
    denoiser, model = pairs[kind]
    call = random_inputs(model.unet, denoiser.limits, rows, conditional, size)
    truth = model(UNetCall(**call))
    assert_equal(denoiser(UNetCall(**call)), truth)
    assert len(truth[1]) == (2 if kind == "sdxl" else 3) and len(truth[2]) == (0 if kind == "static" else len(truth[1]))


@torch.no_grad()
def test_conditional_rows_may_stand_first_and_a_level_may_be_left_out(pairs):
    denoiser, model = pairs["mini"]
    call = random_inputs(model.unet, denoiser.limits, 4, 2, (128, 128)) | {"first_conditional": 0}
    del call["prior"]["0"]
    assert_equal(denoiser(UNetCall(**call)), model(UNetCall(**call)))
    found = denoiser(UNetCall(**call | {"first_conditional": 2}))
    assert relative(found[1]["0"], model(UNetCall(**call))[1]["0"]) > 1e-2


@torch.no_grad()
def test_a_number_is_a_timestep_and_inputs_need_not_be_contiguous(static):
    denoiser, model = static
    call = random_inputs(model.unet, denoiser.limits, 4, 2, (64, 96)) | {"timestep": 77.0}
    call["latents"] = call["latents"].transpose(2, 3).contiguous().transpose(2, 3)
    assert not call["latents"].is_contiguous()
    assert_equal(denoiser(UNetCall(**call)), model(UNetCall(**call)))


@torch.no_grad()
def test_the_noise_has_the_type_of_the_latents_and_maps_are_fp32(static):
    denoiser, model = static
    call = random_inputs(model.unet, denoiser.limits, 2, 1, (64, 96))
    noise, maps, _ = denoiser(UNetCall(**call | {"latents": call["latents"].half()}))
    assert noise.dtype == torch.float16 and {value.dtype for value in maps.values()} == {torch.float32}
    assert relative(noise.float(), model(UNetCall(**call))[0]) < 1e-2


@pytest.mark.parametrize(
    "kind, rows, size, change, words",
    [
        ("mini", 10, (128, 128), {}, "at most 4 images"),
        ("mini", 9, (128, 128), {}, "at most 4 images"),
        ("mini", 2, (128, 288), {}, "width from 128 to 256"),
        ("static", 2, (64, 64), {}, "width from 96 to 96"),
        ("static", 2, (64, 96), {"select": torch.rand(1, 77, 3)}, "at most 2 phrases, and 3 phrases"),
        ("static", 2, (64, 96), {"prior": {"1": torch.rand(1, 1, 24)}}, "does not propagate maps at level 1"),
        ("mini", 2, (128, 128), {"prior": {"1": torch.rand(1, 9, 64)}}, "at most 8 maps, not 9"),
        ("mini", 2, (128, 128), {"unet_kwargs": {"timestep_cond": torch.rand(2)}}, "has no timestep_cond"),
        ("mini", 2, (128, 128), {"encoder_hidden_states": torch.rand(2, 80, 128)}, "77 tokens, not 80"),
    ],
)
def test_what_the_graph_cannot_do_is_one_sentence(pairs, kind, rows, size, change, words):
    denoiser, model = pairs[kind]
    with pytest.raises(DiffuMaskError, match=words):
        denoiser(UNetCall(**random_inputs(model.unet, denoiser.limits, rows, 1, size) | change))
