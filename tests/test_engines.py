import pytest

from diffumask_fast import DiffuMaskError
from diffumask_fast.bench import engines


def test_rows_plain_and_with_maps_for_each_number_of_threads(sdxl_folder, sdxl_engine):
    rows = engines.run("mini", "cpu", model=sdxl_folder, engine_path=sdxl_engine, batch=2, steps=1, pairs=1)
    names = [(row["name"], row["config"]["threads"]) for row in rows]
    assert names == [("onnx_plain", 1), ("onnx_maps", 1), ("onnx_plain", 2), ("onnx_maps", 2)]
    for row in rows:
        assert (row["suite"], row["unit"], row["n"]) == ("engines", "ratio", 1)
        assert row["value"] > 0 and row["config"]["onnxruntime"] and row["config"]["torch"]


def test_an_unknown_geometry_is_refused():
    with pytest.raises(DiffuMaskError, match="no geometry sd15: use mini"):
        engines.run("sd15")
