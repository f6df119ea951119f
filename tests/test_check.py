import copy

import pytest
import torch
from conftest import relative
from diffusers import AutoencoderKL

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.export import check
from diffumask_fast.export.graphs import exportable_decoder, write_graph
from diffumask_fast.export.manifest import read_manifest
from diffumask_fast.models.device import DTYPES


def test_the_figures_of_an_export_are_small_and_complete(mini_engine, sdxl_engine, static_engine):
    for engine, names in ((mini_engine, 3), (sdxl_engine, 3), (static_engine, 2)):
        checked = read_manifest(engine).checked
        assert len(checked["unet"]) == names and {"vae", "text_encoder"} <= set(checked)
        assert all(0 < error < 1e-4 for part in checked.values() for error in part.values()), checked
    assert "penultimate" in read_manifest(sdxl_engine).checked["text_encoder_2"]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_reduced_types_are_checked_or_said_to_be_unchecked(static_engine, sd_parts, tmp_path, dtype):
    limits, vae = read_manifest(static_engine).limits, copy.deepcopy(sd_parts["vae"])
    write_graph(exportable_decoder(torch.nn.Module.to(vae, DTYPES[dtype]), limits, 4), tmp_path / "vae.onnx", 2**30)
    found = check.check_part("vae", tmp_path / "vae.onnx", sd_parts["vae"], limits, dtype)
    if dtype == "fp16":
        assert 1e-6 < found["image"] < 5e-3
    else:
        assert found == "written, never run: ONNX Runtime has no bf16 on the CPU"


def test_a_vae_with_attention_is_exported(static_engine, tmp_path):
    wide = dict(block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=4, layers_per_block=1)
    kinds = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    limits, vae = read_manifest(static_engine).limits, AutoencoderKL(**wide, **kinds).eval()
    write_graph(exportable_decoder(vae, limits, 4), tmp_path / "vae.onnx", 2**30)
    assert check.check_part("vae", tmp_path / "vae.onnx", vae, limits, "fp32")["image"] < 1e-4


@pytest.mark.parametrize("change", [1e-2, float("nan")])
def test_a_graph_of_other_weights_does_not_pass(static_engine, sd_parts, change):
    limits = read_manifest(static_engine).limits
    for name, part, weight in (
        ("unet", sd_parts["unet"], "conv_out.bias"),
        ("vae", sd_parts["vae"], "decoder.layers.0.bias"),
        ("text_encoder", sd_parts["text_encoder"], "text_model.final_layer_norm.bias"),
    ):
        other = copy.deepcopy(part)
        names = dict(other.named_parameters())
        with torch.no_grad():
            names.get(weight, names.get(weight.removeprefix("text_model."))).add_(change)
        with pytest.raises(DiffuMaskError, match=f"graph of {name} does not give what torch gives"):
            check.check_part(name, static_engine / f"{name}.onnx", other, limits, "fp32")


def test_the_largest_error_is_kept_and_nan_is_never_lost():
    errors = {}
    truth = torch.ones(3)
    for value in (1.1, float("nan"), 1.0):
        check._keep_largest(errors, [("x", torch.full((3,), value), truth)])
        check._keep_largest(errors, [("y", torch.full((3,), 1.5), truth)])
    assert errors["x"] != errors["x"] and errors["y"] == pytest.approx(0.5)
    assert check.relative_error(truth * 2, truth) == relative(truth * 2, truth) == 1


def test_shapes_include_one_that_is_not_square_where_there_is_room(mini_engine, static_engine):
    assert check._shapes(read_manifest(mini_engine).limits) == [(1, True, (128, 128)), (3, False, (128, 160))]
    assert check._shapes(read_manifest(static_engine).limits)[1][2] == (64, 96)
