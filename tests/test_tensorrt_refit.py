import json
import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.export import tensorrt_refit
from diffumask_fast.export.tensorrt_refit import refit_engine, refit_plan

trt = pytest.importorskip("tensorrt_rtx_bindings")


def altered(source, folder, changes):
    """Copy an engine's folder with other words in its manifest."""
    shutil.copytree(source, folder)
    path = folder / "engine.json"
    data = json.loads(path.read_text())
    data["versions"]["tensorrt-rtx"] = trt.__version__
    path.write_text(json.dumps(data | changes))
    return folder


RTX = {"engine": "tensorrt-rtx", "target": "8.9", "refittable": True}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, "is an engine for onnx, whose models are exported anew: leave `refit` out"),
        (RTX | {"refittable": False}, "export its model again with `refittable`"),
        (RTX, "compute capability 8.9 and there is none here"),
    ],
)
def test_what_cannot_be_refitted_is_one_sentence(static_engine, tmp_path, changes, words):
    engine = altered(static_engine, tmp_path / "engine", changes)
    with pytest.raises(DiffuMaskError, match=words):
        refit_engine(engine, "mini", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_a_model_of_another_geometry_leaves_nothing(static_engine, tmp_path, monkeypatch):
    engine = altered(static_engine, tmp_path / "engine", RTX)
    monkeypatch.setattr(tensorrt_refit, "compute_capability", lambda: "8.9")
    with pytest.raises(DiffuMaskError, match="mini has another geometry.*export it by itself"):
        refit_engine(engine, "mini", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_a_damaged_engine_is_refused(tmp_path):
    (tmp_path / "unet.engine").write_bytes(b"nonsense")
    with pytest.raises(DiffuMaskError, match="cannot load"):
        refit_plan(trt, tmp_path / "unet.engine", tmp_path / "unet.onnx")


def test_an_engine_with_other_weights_can_be_refitted_again(tmp_path):
    (tmp_path / "unet.engine").write_bytes(b"engine")
    engine, config = Mock(spec=trt.ICudaEngine), Mock(spec=trt.ISerializationConfig)
    engine.create_serialization_config.return_value = config
    engine.serialize_with_config.return_value = b"refitted"
    runtime, refitter = Mock(spec=trt.Runtime), Mock(spec=trt.Refitter)
    runtime.deserialize_cuda_engine.return_value = engine
    parser = Mock(spec=trt.OnnxParserRefitter)
    library = SimpleNamespace(
        ILogger=trt.ILogger, SerializationFlag=trt.SerializationFlag, Runtime=lambda _: runtime,
        Refitter=lambda *_: refitter, OnnxParserRefitter=lambda *_: parser,
    )  # fmt: skip
    assert refit_plan(library, tmp_path / "unet.engine", tmp_path / "unet.onnx") == b"refitted"
    config.set_flag.assert_called_once_with(trt.SerializationFlag.INCLUDE_REFIT)
    for answers in (parser.refit_from_file, refitter.refit_cuda_engine):
        answers.return_value = False
        with pytest.raises(DiffuMaskError, match="weights of unet.onnx do not fit"):
            refit_plan(library, tmp_path / "unet.engine", tmp_path / "unet.onnx")
        answers.return_value = True
