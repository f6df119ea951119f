import json

import pytest

from diffumask_fast import DiffuMaskError
from diffumask_fast.bench import end_to_end

FEW = dict(batch=2, steps=1, mask_steps=1, pairs=1)


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """The tiny model, with a list of the classes that its tokenizer knows."""
    copy = tmp_path / "model"
    copy.mkdir()
    for part in tiny_folder.iterdir():
        (copy / part.name).symlink_to(part)
    known = {"classes": ["dog", "cat"], "scenes": {"on the grass": ["dog", "cat"]}}
    known |= {"num_inference_steps": 2, "guidance_scale": 3.0}
    (copy / "diffumask.json").write_text(json.dumps(known))
    return copy


def test_three_rows(folder):
    rows = end_to_end.run("mini", device="cpu", model=folder, **FEW)
    assert [row["name"] for row in rows] == ["maps_overhead", "propagation_overhead", "masks_overhead"]
    for row in rows:
        assert list(row) == ["suite", "name", "value", "unit", "low", "high", "n", "config"]
        assert (row["suite"], row["unit"], row["n"]) == ("end_to_end", "ratio", 1)
        assert row["low"] <= row["value"] <= row["high"]
        config = row["config"]
        assert (config["geometry"], config["batch"], config["guidance_scale"], config["threads"]) == ("mini", 2, 3.0, 1)
        assert config["torch"] and config["diffusers"] and config["cpu"]
        assert "control_deviation" in config
    assert [row["config"].get("propagate") for row in rows[:2]] == ["none", 1]
    assert rows[2]["config"]["mask"]["refine"] == "guided"
    assert rows[0]["config"]["num_inference_steps"] == 1


def test_the_masks_row_uses_the_models_own_steps(folder):
    rows = end_to_end.run(device="cpu", model=folder, names=["masks_overhead"], batch=1, pairs=1)
    assert rows[0]["config"]["num_inference_steps"] == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (dict(geometry="sd15"), "no geometry sd15: use mini"),
        (dict(names=["maps"]), "no row maps in end_to_end: use maps_overhead"),
    ],
)
def test_what_there_is_not_is_said(arguments, sentence):
    with pytest.raises(DiffuMaskError, match=sentence):
        end_to_end.run(**arguments)
