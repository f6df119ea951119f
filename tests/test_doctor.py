import sys

from diffumask_fast import doctor, loading
from diffumask_fast.errors import DiffuMaskError


def test_the_report_names_versions_devices_and_what_works():
    report = doctor.examine()
    assert {"python", "torch", "diffusers", "pyarrow"} <= set(report["versions"])
    assert "threads" in report["devices"]["cpu"]
    assert report["works"] == dict.fromkeys(report["works"], "works") and len(report["works"]) == 6


def test_what_does_not_work_has_its_reason(monkeypatch):
    def refuse(_):
        raise DiffuMaskError("weights are missing")

    monkeypatch.setattr(loading, "find_model", refuse)
    assert doctor.examine()["works"]["embedded model"] == "does not work: weights are missing"


def test_a_machine_without_onnx_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    works = doctor.examine()["works"]
    assert "pip install 'diffumask-fast[onnx]'" in works["onnx engine"]
    assert "pip install 'diffumask-fast[onnx]'" in works["export to onnx"]
    assert works["torch engine"] == "works"
