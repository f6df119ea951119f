from diffumask_fast import doctor, loading
from diffumask_fast.errors import DiffuMaskError


def test_the_report_names_versions_devices_and_what_works():
    report = doctor.examine()
    assert {"python", "torch", "diffusers", "pyarrow"} <= set(report["versions"])
    assert "threads" in report["devices"]["cpu"]
    assert report["works"] == dict.fromkeys(report["works"], "works") and len(report["works"]) == 3


def test_what_does_not_work_has_its_reason(monkeypatch):
    def refuse(_):
        raise DiffuMaskError("weights are missing")

    monkeypatch.setattr(loading, "find_model", refuse)
    assert doctor.examine()["works"]["embedded model"] == "does not work: weights are missing"
