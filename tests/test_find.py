import json
import os
import shutil

import pytest

from diffumask_fast import mini
from diffumask_fast.attention.options import MapOptions
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.models.find import check_folder, find_model, with_options


@pytest.fixture
def copy(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


def test_mini_lists_what_it_knows():
    info = find_model("mini")
    assert info.folder == mini.folder() and len(info.classes) == 18
    assert {"dog", "aeroplane", "pottedplant", "tvmonitor"} <= set(info.classes)
    assert info.num_inference_steps > 0 and info.scenes["on the water"]


def test_mini_is_small_and_holds_no_pickle():
    files = [path for path in mini.folder().rglob("*") if path.is_file()]
    weights = sum(path.stat().st_size for path in files if path.suffix == ".safetensors")
    assert 0 < weights <= 25 * 2**20
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jsonl", ".txt", ".md"}


def test_other_folders_have_the_general_defaults(tiny_folder):
    info = find_model(tiny_folder)
    assert (info.num_inference_steps, info.guidance_scale, info.classes) == (30, 7.5, ())


def test_a_missing_model_is_one_sentence(tmp_path):
    with pytest.raises(DiffuMaskError, match="no model folder"):
        find_model(tmp_path / "nowhere" / "deeper")
    with pytest.raises(DiffuMaskError, match="no model_index.json"):
        find_model(tmp_path)
    (tmp_path / "sd15.safetensors").touch()
    with pytest.raises(DiffuMaskError, match=r"sd15\.safetensors is a file and no model folder: .*from_single_file"):
        find_model(tmp_path / "sd15.safetensors")


def test_a_half_written_folder_is_refused(copy):
    weights = next((copy / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DiffuMaskError, match="cut off or damaged"):
        check_folder(copy)
    weights.unlink()
    with pytest.raises(DiffuMaskError, match="no weights"):
        check_folder(copy)
    shutil.rmtree(copy / "unet")
    with pytest.raises(DiffuMaskError, match="names unet, which is missing"):
        check_folder(copy)


def test_pickles_are_refused(copy):
    weights = next((copy / "unet").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(DiffuMaskError, match="pickle"):
        check_folder(copy)


def test_a_damaged_index_is_one_sentence(copy):
    (copy / "model_index.json").write_text("{")
    with pytest.raises(DiffuMaskError, match="not valid JSON"):
        check_folder(copy)


def test_a_damaged_diffumask_json_is_one_sentence(copy):
    (copy / "diffumask.json").write_text(json.dumps({"classes": 3}))
    with pytest.raises(DiffuMaskError, match="diffumask.json is damaged"):
        find_model(copy)


@pytest.mark.parametrize(
    "mask, words",
    [
        ({"threshold": 2}, "'threshold' must be"),
        ({"sharpness": 1}, "sharpness is no option"),
        ({}, "no 'classes'"),
        (None, "None is no JSON object"),
    ],
)
def test_options_that_are_none_are_refused(copy, mask, words):
    (copy / "diffumask.json").write_text(json.dumps({"mask": mask}))
    with pytest.raises(DiffuMaskError, match=f"diffumask.json is damaged .*{words}.*: fetch the model again"):
        find_model(copy)


@pytest.mark.parametrize(
    "changes",
    [{"classes": "dog"}, {"classes": [1]}, {"scenes": {"on the grass": "dog"}}, {"num_inference_steps": 0},
     {"num_inference_steps": 2.5}, {"guidance_scale": float("nan")}, {"mask": {"fill_holes": "no"}}, {"scheduler": 5},
     {"scenes": []}],
    ids=str,
)  # fmt: skip
def test_settings_of_another_kind_are_refused(copy, changes):
    known = json.loads((mini.folder() / "diffumask.json").read_text())
    (copy / "diffumask.json").write_text(json.dumps(known))
    assert find_model(copy).num_inference_steps == 25
    (copy / "diffumask.json").write_text(json.dumps({**known, **changes}))
    with pytest.raises(DiffuMaskError, match="diffumask.json is damaged .*: fetch the model again"):
        find_model(copy)


def test_nothing_is_too_deep_and_auto_is_what_is_best_in_general(copy):
    (copy / "diffumask.json").write_text('{"mask": {"aggregation": "auto", "propagate": "auto"}}')
    assert find_model(copy).map_options() == MapOptions("paper", 1)
    (copy / "diffumask.json").write_text("[" * 10**5)
    with pytest.raises(DiffuMaskError, match="diffumask.json is damaged"):
        find_model(copy)


def test_options_alone_are_those_of_a_model_that_draws_any_class(copy, tmp_path):
    mask = {"aggregation": "1,2", "threshold": 0.4, "fill_holes": True}
    (copy / "diffumask.json").write_text(json.dumps({"mask": mask}))
    info = find_model(copy)
    assert info.mask == mask and info.classes == () and info.scenes is None and info.defaults == {}
    assert info.map_options() == MapOptions("1,2", 1) and info.map_options(MapOptions("paper", 2)).propagate == 2
    assert info.mask_options() == MaskOptions(threshold=0.4, fill_holes=True)
    assert info.mask_options(MaskOptions(eps=0.5)) == MaskOptions(eps=0.5)
    (tmp_path / "other.json").write_text(json.dumps({"mask": {"propagate": "none"}}))
    other = with_options(info, tmp_path / "other.json")
    assert other.map_options() == MapOptions("paper", "none") and other.mask_options() == MaskOptions()
    assert with_options(info, None) is info


def test_few_steps_have_options_of_their_own(copy, tmp_path):
    few = {"4": {"threshold": 0.7, "propagate": 2}, "2": {"threshold": 0.8, "propagate": "none"}}
    known = {"mask": {"aggregation": "finest", "eps": 0.01}, "few_steps": few}
    (copy / "diffumask.json").write_text(json.dumps(known))
    info = find_model(copy)
    found = {steps: (info.map_options(None, steps), info.mask_options(None, steps)) for steps in (None, 1, 2, 3, 4, 5)}
    usual, two, four = (
        (MapOptions("finest", times), MaskOptions(threshold=cut, eps=0.01))
        for times, cut in ((1, "otsu"), ("none", 0.8), (2, 0.7))
    )
    assert found == {None: usual, 1: two, 2: two, 3: four, 4: four, 5: usual}
    assert info.map_options(MapOptions("paper", 1), 2) == MapOptions("paper", 1)
    assert info.mask_options(MaskOptions(), 2) == MaskOptions()
    (copy / "diffumask.json").write_text(json.dumps({"few_steps": few}))
    alone = find_model(copy)
    assert alone.map_options(None, 2) == MapOptions("paper", "none") and alone.mask_options() == MaskOptions()
    (tmp_path / "few.json").write_text(json.dumps({"few_steps": few}))
    assert with_options(info, tmp_path / "few.json").few_steps == {4: few["4"], 2: few["2"]}
    (tmp_path / "few.json").write_text("{}")
    with pytest.raises(DiffuMaskError, match="few.json is damaged .it has no mask or few_steps"):
        with_options(info, tmp_path / "few.json")


@pytest.mark.parametrize(
    ("few", "words"),
    [({"0": {}}, "'few_steps' must be a whole number"), ({"many": {}}, "'few_steps' must be"), ([], "no JSON object"),
     ({"2": {"threshold": 2}}, "'threshold' must be"), ({"2": {"sharpness": 1}}, "sharpness is no option"),
     ({"2": None}, "None is no JSON object"), ({"2": {}, "02": {}}, "few_steps has one number of steps twice")],
    ids=str,
)  # fmt: skip
def test_options_of_few_steps_that_are_none_are_refused(copy, few, words):
    (copy / "diffumask.json").write_text(json.dumps({"few_steps": few}))
    with pytest.raises(DiffuMaskError, match=f"diffumask.json is damaged .*{words}"):
        find_model(copy)


def test_a_path_that_safetensors_cannot_open_is_said(tiny_folder, tmp_path):
    model = shutil.copytree(tiny_folder, os.fsdecode(os.fsencode(tmp_path) + b"/mod\xff"))
    with pytest.raises(DiffuMaskError, match="is not in UTF-8, .*: rename the folder"):
        find_model(model)
