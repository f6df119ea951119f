"""convert/plan.py: the split, by prompt; numbers of classes and items."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
from foreign import converted, dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from samples import draw

from diffumask_fast.convert.options import ConvertOptions
from diffumask_fast.convert.plan import choose, group_of, make_plan, number_classes, palette_for, picked
from diffumask_fast.dataset.reader import Row, read_manifest, shard_paths
from diffumask_fast.dataset.run import open_run
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.prompts.class_entry import ClassEntry
from diffumask_fast.prompts.planner import Plan, Recipe
from diffumask_fast.prompts.vocabulary import Vocabulary, voc_palette


def planned(source, **options):
    options = ConvertOptions(source, Path("nowhere"), "voc", **options)
    return make_plan(read_manifest(source), options), options


def test_images_of_one_prompt_are_on_one_side(tmp_path):
    source = dataset(tmp_path / "a", 60)
    plan, options = planned(source, val=0.2)
    sides: dict[str, set[str]] = {}
    for path in shard_paths(source):
        for row in picked(path, options, ["key", "prompt"]):
            sides.setdefault(row.prompt, set()).add(plan.split.of(row))
    assert all(len(side) == 1 for side in sides.values()) and len(sides) == 30
    assert plan.counts == {"train": 47, "val": 12}
    other, _ = planned(source, val=0.2, seed=1)
    assert other.counts == plan.counts and other.split.validation.isdisjoint(plan.split.validation)


def test_prompts_that_differ_in_spaces_and_capitals_are_one():
    rows = [
        Row({"key": str(n), "prompt": text}) for n, text in enumerate(["A dog", " a  DOG ", "a dog.", "", "", "a\tdog"])
    ]
    groups = [group_of(row, 0) for row in rows]
    assert groups[0] == groups[1] == groups[5] and len(set(groups)) == 4
    assert groups[0] != group_of(rows[0], 1)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=30), st.floats(0.01, 0.9))
def test_the_share_is_met_as_nearly_as_groups_allow(sizes, share):
    chosen = choose(dict(enumerate(sizes)), share)
    count, target = sum(sizes[group] for group in chosen), max(1, round(share * sum(sizes)))
    assert 0 < len(chosen) < len(sizes)
    assert count <= target or count == min(sizes)
    left_out = [size for group, size in enumerate(sizes) if group not in chosen]
    assert count == min(sizes) or all(count + size > target for size in left_out) or len(left_out) == 1


def test_one_prompt_alone_is_not_split():
    assert choose({5: 100}, 0) == frozenset()
    with pytest.raises(DiffuMaskError, match="all images have one prompt.*`val=0`"):
        choose({5: 100}, 0.1)


def test_items_and_tars_are_numbered_without_gaps(tmp_path):
    plan, options = planned(dataset(tmp_path / "a", 23), val=0.3)
    first, tars = 1, Counter[str]()
    for shard in plan.shards:
        assert (shard.first, shard.place) == (first, {"train": tars["train"], "val": tars["val"]})
        splits = Counter(plan.split.of(row) for row in picked(shard.path, options, ["key", "prompt"]))
        first += splits.total()
        assert splits.total() == shard.count
        tars.update(set(splits))
    assert first == 23 and plan.counts["train"] + plan.counts["val"] == 22  # one is rejected
    assert planned(tmp_path / "a", all=True)[0].counts["train"] == 23


def test_numbers_of_classes():
    own, voc = {0: "background", 3: "x", 200: "y"}, {0: "background", 12: "dog"}
    assert number_classes(own, "own") == {0: 0, 3: 3, 200: 200}
    assert number_classes(own, "compact") == number_classes(own, "voc") == {0: 0, 3: 1, 200: 2}
    assert number_classes(voc, "voc") == {0: 0, 12: 12} and number_classes(voc, "compact") == {0: 0, 12: 1}
    assert number_classes({0: "background", 12: "cat"}, "voc") == {0: 0, 12: 1}


def test_what_cannot_be_planned(tmp_path):
    source = dataset(tmp_path / "a")
    manifest = json.loads((source / "dataset.json").read_text())
    manifest["options"]["augment"] = {}
    options = ConvertOptions(source, Path("nowhere"), "voc", val=0.1)
    with pytest.raises(DiffuMaskError, match="is augmented, so that parts of one image would be on both sides"):
        make_plan(manifest, options)
    (source / "data" / "shard-00001.parquet").unlink()
    with pytest.raises(DiffuMaskError, match="is not finished"):
        planned(source)


COLOURED = Vocabulary((ClassEntry(40, "dog", "dog", colour=(255, 0, 0)), ClassEntry(30, "car", "car")))


@pytest.fixture
def coloured(tmp_path):
    plan = Plan(Recipe(COLOURED, 8))
    with open_run(tmp_path / "coloured", plan, {"seed": 0}, {}, 8, vocabulary=COLOURED) as run:
        run.write(0, [dataclasses.replace(draw(request), accepted=True, reason="") for request in plan])
    return tmp_path / "coloured"


def test_a_class_that_one_side_lacks_is_told(coloured, caplog):
    planned(coloured), planned(coloured, val=0.5)
    assert caplog.messages == []
    planned(coloured, val=0.1)
    assert [text.partition(",")[0] for text in caplog.messages] == ["val has no image of car"]
    planned(coloured, val=0.9)
    assert caplog.messages[1].startswith("train has no image of ")


def test_numbers_have_their_classs_colour(coloured, tmp_path):
    plan, _ = planned(coloured)
    palette = palette_for(plan, {0: 0, 30: 1, 40: 2})
    assert palette[:9] == [0, 0, 0, *voc_palette()[90:93], 255, 0, 0] and palette[9:] == voc_palette()[9:]
    dog = ",".join(map(str, palette[6:9]))
    voc = converted(coloured, tmp_path / "voc", "voc")
    assert f"dog:{dog}::" in (voc / "labelmap.txt").read_text().splitlines()
    mask = Image.open(next((voc / "SegmentationClass").iterdir()))
    assert mask.getpalette("RGB") == palette
    config = (converted(coloured, tmp_path / "mmseg", "mmseg") / "dataset_config.py").read_text()
    assert f"palette=[[0, 0, 0], {palette[3:6]}, [255, 0, 0]]" in config
    panoptic = converted(coloured, tmp_path / "pan", "coco-panoptic") / "annotations" / "panoptic_train.json"
    colours = {one["name"]: one["color"] for one in json.loads(panoptic.read_text())["categories"]}
    assert colours["dog"] == [255, 0, 0] and colours["car"] == voc_palette()[90:93]
    labels = (converted(coloured, tmp_path / "studio", "label-studio") / "interface.xml").read_text()
    assert '<Label value="dog" background="#ff0000"/>' in labels
    assert palette_for(dataclasses.replace(plan, colours=()), {0: 0, 30: 1}) == voc_palette()
