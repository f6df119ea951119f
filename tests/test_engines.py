import pytest

from diffumask_fast import DiffuMaskError
from diffumask_fast.bench import engines


def test_rows_plain_with_maps_and_with_masks_for_each_number_of_threads(sdxl_folder, sdxl_engine):
    call = dict(model=sdxl_folder, engine_path=sdxl_engine, engines=["onnx"], batch=2, steps=1, pairs=1)
    rows = list(engines.run("mini", "cpu", **call))
    names = [(row["name"], row["config"]["threads"]) for row in rows]
    assert names == [(f"onnx_{kind}", count) for count in (1, 2) for kind in ("plain", "maps", "masks")]
    for row in rows:
        assert (row["suite"], row["unit"], row["n"]) == ("engines", "ratio", 1)
        assert row["config"]["raw"] > 0 and row["config"]["onnxruntime"] and row["config"]["torch"]


@pytest.mark.slow
def test_the_compiled_engine_beside_eager(tiny_folder):
    call = dict(model=tiny_folder, engines=["compile_bf16"], batch=2, steps=1, pairs=1, threads=(1,))
    rows = list(engines.run("mini", "cpu", **call))
    assert [row["name"] for row in rows] == [f"compile_bf16_{kind}" for kind in ("plain", "maps", "masks")]
    assert all(row["config"]["raw"] > 0 and row["config"]["dtype"] == "bf16" for row in rows)


def test_what_does_not_work_here_is_left_out_or_said(caplog):
    wanted = engines.run("mini", "cpu", steps=1)
    assert "tensorrt is left out" in caplog.text and "onnx is left out" not in caplog.text
    wanted.close()
    with pytest.raises(DiffuMaskError, match="(?i)tensorrt"):
        engines.run("mini", "cpu", engines=["tensorrt"])


def test_xformers_self_attention_of_each_layer_over_sdpa(monkeypatch, xformers):
    monkeypatch.setattr(engines, "check_attention", lambda *given: None)
    monkeypatch.setattr(engines.metadata, "version", lambda name: "0.0.35")
    rows = list(engines.run("mini", "cpu", engines=["xformers"], batch=1, pairs=1))
    assert [(row["config"]["case"], row["config"]["layers"]) for row in rows][-1] == ("all layers", 10)
    assert len(rows) == 4 and {row["name"] for row in rows} == {"xformers_self_attention"}
    layers, last = rows[:-1], rows[-1]
    for row in layers:
        pixels, heads, head_dim = map(int, row["config"]["case"].split("x"))
        assert any(one["query"].shape == (2 * heads, pixels, head_dim) for one in xformers)
        assert row["value"] > 0 and row["config"]["xformers"] == "0.0.35"
    assert min(row["config"]["raw"] for row in layers) <= last["value"] <= max(row["config"]["raw"] for row in layers)


def test_xformers_is_left_out_with_a_line_where_it_does_not_draw(caplog):
    assert list(engines.run("sd15", "cpu")) == []
    assert "xformers is left out: xformers runs on CUDA alone" in caplog.text


def test_a_ratio_is_the_engine_over_eager(tiny_folder, monkeypatch):
    pairs = []
    monkeypatch.setattr(engines, "_plain", lambda contenders: contenders.pipe.engine_name)
    for name in ("mapped", "ours"):
        monkeypatch.setattr(engines.Contenders, name, lambda contenders, *_, **__: contenders.pipe.engine_name)
    monkeypatch.setattr(engines, "compare", lambda one, other, **_: pairs.append((one, other)) or 1.0)
    rows = list(engines.run("mini", "cpu", model=tiny_folder, engines=["compile"], steps=1, threads=(1,)))
    assert pairs == [("compile", "torch")] * 3 == [("compile", "torch")] * len(rows)


def test_an_engine_path_is_one_engines():
    with pytest.raises(DiffuMaskError, match="An engine path is one engine's"):
        engines.run("mini", "cpu", engine_path="somewhere", engines=["onnx", "tensorrt"])


def test_unknown_names_are_refused():
    with pytest.raises(DiffuMaskError, match="no geometry sd15 of onnx: use mini"):
        engines.run("sd15", "cpu", engines=["onnx"])
    with pytest.raises(DiffuMaskError, match="no geometry sd3"):
        engines.run("sd3", "cpu")
    with pytest.raises(DiffuMaskError, match="no engine warp to compare: use compile"):
        engines.run("mini", "cpu", engines=["warp"])
