"""export/export_model.py and export/options.py: one set of options decides which export runs, and how."""

import pytest

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.export import export_model
from diffumask_fast.export.options import ExportOptions, ShapeOptions

SHAPES = ShapeOptions(max_batch=2, max_phrases=3)


@pytest.fixture
def calls(monkeypatch):
    """The arguments of the export that was called, under its name."""
    seen = {}
    for name in ("export_onnx", "export_tensorrt", "refit_engine"):
        monkeypatch.setattr(
            export_model, name, lambda *args, _name=name, **kwargs: seen.update({_name: (args, kwargs)})
        )
    return seen


@pytest.mark.parametrize("dtype, used", [("auto", "fp32"), ("fp16", "fp16")])
def test_onnx_is_exported_in_fp32_or_as_asked(calls, tmp_path, dtype, used):
    export_model.export_model(ExportOptions("mini", tmp_path, dtype=dtype, shapes=SHAPES, revision="main"))
    ((args, kwargs),) = calls.values()
    assert list(calls) == ["export_onnx"] and args == ("mini", tmp_path, used, SHAPES) and kwargs["revision"] == "main"


@pytest.mark.parametrize("to", ["tensorrt", "tensorrt-rtx"])
def test_tensorrt_is_built_in_fp16(calls, tmp_path, to):
    export_model.export_model(ExportOptions("mini", tmp_path, to, compute_capability="8.9", refittable=True))
    ((args, kwargs),) = calls.values()
    assert list(calls) == ["export_tensorrt"] and args == ("mini", tmp_path, "fp16", ShapeOptions())
    assert (kwargs["to"], kwargs["compute_capability"], kwargs["refittable"]) == (to, "8.9", True)


def test_an_engine_gets_the_weights_of_a_fine_tune(calls, tmp_path):
    export_model.export_model(ExportOptions("engine", tmp_path, refit="fine-tune"))
    assert list(calls) == ["refit_engine"] and calls["refit_engine"][0] == ("engine", "fine-tune", tmp_path)


@pytest.mark.parametrize("wrong", [dict(refittable=True), dict(compute_capability="8.9")])
def test_options_of_tensorrt_are_refused_for_onnx(tmp_path, wrong):
    with pytest.raises(DiffuMaskError, match="are TensorRT's: use `to=tensorrt`"):
        ExportOptions("mini", tmp_path, **wrong)
    assert ExportOptions("mini", tmp_path, "tensorrt", **wrong) and ExportOptions("e", tmp_path, refit="m", **wrong)


@pytest.mark.parametrize("wrong", [dict(to="coreml"), dict(dtype="int8")])
def test_words_are_checked(tmp_path, wrong):
    with pytest.raises(DiffuMaskError, match=f"`{next(iter(wrong))}` must be one of"):
        ExportOptions("mini", tmp_path, **wrong)


def test_shapes_take_the_command_lines_words():
    assert ShapeOptions("4", "64x96", (128, 128)) == ShapeOptions(4, (64, 96), (128, 128))
