import pytest

from diffumask_fast import DiffuMaskError
from diffumask_fast.bench import geometries, scaling


def test_rows_over_batches_and_over_steps(monkeypatch):
    rows = list(scaling.run("mini", "cpu", batches=(1, 3), numbers=(3, 6), steps=1, pairs=1))
    assert [row["name"] for row in rows] == ["images_per_s", "peak_memory"] * 2 + ["peak_memory_steps"] * 2
    rates = [row for row in rows if row["name"] == "images_per_s"]
    assert [row["config"]["batch"] for row in rates] == [1, 3] and all(row["value"] > 0 for row in rates)
    assert set(rates[0]["config"]["stages_s"]) == {"denoise", "decode", "masks"}
    peaks = [row["value"] for row in rows if row["name"] == "peak_memory"]
    assert 1.5 < peaks[1] / peaks[0] < 4
    flat = [row["value"] for row in rows if row["name"] == "peak_memory_steps"]
    assert flat[1] / flat[0] == pytest.approx(1, abs=0.02)


def test_too_little_memory(monkeypatch):
    monkeypatch.setattr(geometries, "free_bytes", lambda device: 2**31)
    with pytest.raises(DiffuMaskError, match="Geometry sdxl needs 14.9 GiB"):
        scaling.run("sdxl", "cpu")
