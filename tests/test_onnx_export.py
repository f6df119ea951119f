import shutil
import sys

import pytest
from conftest import make_unet

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.export import onnx_export
from diffumask_fast.export.onnx_export import export_onnx, find_limits, level_divisors
from diffumask_fast.export.options import ShapeOptions


def test_levels_and_their_sizes(sdxl_parts):
    assert level_divisors(make_unet()) == {"0": 1, "1": 2, "2": 4}
    assert level_divisors(sdxl_parts["unet"]) == {"0": 2, "1": 4}
    down = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
    up = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
    assert level_divisors(make_unet(down_block_types=down, up_block_types=up)) == {"0": 1, "1": 2, "2": 4}


def test_limits_of_a_model(tiny_sd):
    limits = find_limits(tiny_sd, ShapeOptions(max_batch=4))
    assert (limits.rows, limits.height, limits.width) == ((1, 8), (64, 128), (64, 128))
    assert (limits.multiple, limits.vae_factor, limits.tokens, limits.channels) == (32, 8, 77, 4)
    assert limits.propagated == ("0", "1", "2")
    large = find_limits(tiny_sd, ShapeOptions(4, (512, 512), (512, 1024)))
    assert large.propagated == ("1", "2") and large.width == (512, 1024)
    assert find_limits(tiny_sd, ShapeOptions(4, (64, 96), static=True, propagate=False)).rows == (8, 8)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(max_batch=0), "`max_batch` must be a whole number from 1 on"),
        (dict(max_phrases=0), "`max_phrases` must be a whole number from 1 on"),
        (dict(min_size=(48, 64)), "multiples of 32"),
        (dict(min_size=(96, 96), max_size=(64, 64)), "`min_size=96x96` and `max_size=64x64` do not go together"),
        (dict(min_size=(64, 64), max_size=(96, 96), static=True), "do not go together"),
    ],
)
def test_limits_that_no_engine_can_have(tiny_sd, settings, words):
    with pytest.raises(DiffuMaskError, match=words):
        find_limits(tiny_sd, ShapeOptions(**settings))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), DiffuMaskError("no")])
def test_nothing_half_written_is_left(tiny_folder, tmp_path, monkeypatch, error):
    def write_half(call, path, external_bytes):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(onnx_export, "write_graph", write_half)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else DiffuMaskError):
        export_onnx(tiny_folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays(tiny_folder, static_engine):
    before = {path.name: path.stat().st_mtime_ns for path in static_engine.iterdir()}
    with pytest.raises(DiffuMaskError, match="is there already"):
        export_onnx(tiny_folder, static_engine)
    assert {path.name: path.stat().st_mtime_ns for path in static_engine.iterdir()} == before
    assert not [path for path in static_engine.parent.iterdir() if path.name.startswith(".")]


def test_a_missing_library_and_a_wrong_type_are_one_sentence(tiny_folder, tmp_path, monkeypatch):
    with pytest.raises(DiffuMaskError, match="no dtype int8"):
        export_onnx(tiny_folder, tmp_path / "out", "int8")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(DiffuMaskError, match=r"needs onnxscript.*pip install 'diffumask-fast\[onnx\]'"):
        export_onnx(tiny_folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_unet_that_is_told_its_guidance_is_refused(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "lcm")
    make_unet(time_cond_proj_dim=16).save_pretrained(folder / "unet")
    with pytest.raises(DiffuMaskError, match="LCM.*`engine=torch`"):
        export_onnx(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["lcm"]


def test_a_name_that_no_folder_can_have_is_refused_first(tmp_path):
    with pytest.raises(DiffuMaskError, match="Cannot write .*File name too long.*choose another folder"):
        export_onnx("mini", tmp_path / ("x" * 300))
