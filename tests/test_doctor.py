import sys

import pytest

from diffumask_fast import doctor
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.kernels import native
from diffumask_fast.models import find


def test_the_report_names_versions_devices_and_what_works():
    report = doctor.examine()
    assert {"python", "torch", "diffusers", "pyarrow"} <= set(report["versions"])
    assert "threads" in report["devices"]["cpu"]
    reasons = {name: reason for name, reason in report["works"].items() if reason != "works"}
    assert len(report["works"]) == 11 and {name.split()[-1] for name in reasons} <= {"engine", "tensorrt", "xformers"}
    assert report["conflicts"] == {}


def test_engines_for_a_gpu_say_what_is_missing(monkeypatch):
    pytest.importorskip("tensorrt_rtx_bindings")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    works = doctor.examine()["works"]
    assert works["export to tensorrt-rtx"] == "works"
    assert works["tensorrt-rtx engine"] == "does not work: torch sees no NVIDIA GPU here"
    for name in ("export to tensorrt", "tensorrt engine"):
        assert "pip install 'diffumask-fast[onnx,tensorrt]'" in works[name]


def test_both_packages_of_onnx_runtime_are_a_conflict(monkeypatch, tmp_path):
    for name in ("onnxruntime", "onnxruntime-gpu"):
        folder = tmp_path / f"{name.replace('-', '_')}-1.31.1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.31.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    report = doctor.examine()
    assert report["versions"]["onnxruntime-gpu"] == "1.31.1"
    (sentence,) = report["conflicts"].values()
    assert "pip uninstall -y onnxruntime onnxruntime-gpu, then install one of them again" in sentence


@pytest.mark.parametrize(
    "triton, numpy, named",
    [("3.6.0", "2.4.6", True), ("3.6.0", "2.3.5", False), ("3.7.1", "2.5.5", False), ("not installed", "2.4.6", False)],
)
def test_an_interpreter_that_fails_with_the_numpy_here_is_a_conflict(monkeypatch, triton, numpy, named):
    monkeypatch.setattr(doctor, "_versions", lambda: {"triton": triton, "numpy": numpy})
    assert ("numpy and triton" in doctor.examine()["conflicts"]) == named


def test_xformers_says_why_it_does_not_draw(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "the device is cpu: use --attention sdpa" in doctor.examine()["works"]["xformers"]


def test_what_does_not_work_has_its_reason(monkeypatch):
    def refuse(_):
        raise DiffuMaskError("weights are missing")

    monkeypatch.setattr(find, "find_model", refuse)
    assert doctor.examine()["works"]["embedded model"] == "does not work: weights are missing"


def test_a_machine_without_onnx_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    works = doctor.examine()["works"]
    assert "pip install 'diffumask-fast[onnx]'" in works["onnx engine"]
    assert "pip install 'diffumask-fast[onnx]'" in works["export to onnx"]
    assert works["torch engine"] == "works"


def test_what_would_be_faster_depends_on_the_processor_and_a_compiler(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(doctor, "has_bf16", lambda: True)
    assert doctor.examine()["faster"].keys() == {"--dtype bf16", "--engine compile"}
    monkeypatch.setattr(doctor, "has_bf16", lambda: False)
    monkeypatch.setattr("shutil.which", lambda _: None)
    native.library.cache_clear()
    assert doctor.examine()["faster"] == {}
