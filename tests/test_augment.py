"""learning/augment.py: a dataset with its own images and new ones, finished as a run is."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import load_dataset
from killed import kill_at
from PIL import Image
from samples import contents, draw, requests
from typer.testing import CliRunner

from diffumask_fast.cli import app
from diffumask_fast.dataset.derive import derive
from diffumask_fast.dataset.origin import is_drawn
from diffumask_fast.dataset.reader import read_rows
from diffumask_fast.dataset.remask import remask
from diffumask_fast.dataset.run import open_run
from diffumask_fast.dataset.schema import make_row
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.augment import NOTHING_LEFT, augment, plan_rows
from diffumask_fast.learning.augmentations import gaussian_blur, splice
from diffumask_fast.learning.data import open_data
from diffumask_fast.learning.options import AugmentationOptions, AugmentOptions
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.options import ReadOptions
from diffumask_fast.prompts.vocabulary import Vocabulary

HOW = AugmentationOptions(splice="1x2=0.3,2x2=0.4", blur=0.5, occlude=0.75, perspective=1.5)


def dataset(folder, change=lambda sample: sample, num=12, **keywords):
    vocabulary = Vocabulary.parse("dog,car")
    with open_run(folder, requests(num, **keywords), {"seed": 0}, {"torch": "2"}, 5, vocabulary=vocabulary) as run:
        for index in run.missing_shards():
            run.write(index, [change(draw(request)) for request in run.requests_of(index)])
    return folder


def augmented(source, out, how=HOW, **keywords):
    return augment(AugmentOptions(source, out, how, **keywords))


def rows(folder):
    return {row.key: row for row in read_rows(folder, accepted_only=False)}


def test_the_default_makes_of_60000_images_what_the_papers_program_makes():
    names = [(f"dog-{number:06d}", number) for number in range(60_000)]
    options = AugmentOptions("in", "out", AugmentationOptions(blur=0, occlude=0, perspective=0), originals=False)
    found = Counter(planned.grid for planned in plan_rows(names, options))
    assert found[1, 2] + found[2, 1] == 3000 and found[1, 2] == found[2, 1]
    assert [found[side, side] for side in (2, 3, 5, 8)] == [3000, 4000, 3000, 1000] and len(found) == 6


def test_new_rows_follow_their_image_and_say_what_they_are_made_of(tmp_path):
    source = rows(dataset(tmp_path / "a"))
    path = tmp_path / "a" / "dataset.json"
    drifted = json.loads(path.read_text()) | {"drift": [{"environment": {"torch": "3"}, "shards": [1]}]}
    path.write_text(json.dumps(drifted))
    kept = [row for row in source.values() if row.accepted]
    assert len(kept) == 9
    summary = augmented(tmp_path / "a", tmp_path / "b")
    new = rows(tmp_path / "b")
    kinds = Counter(row.augmentation.split()[0] for row in new.values() if row.augmentation)
    assert kinds == {"splice": 3 + 4, "blur": 5, "occlude": 7, "perspective": 14}
    assert summary["images"] == len(new) == 9 + 33 and summary["folder"] == str(tmp_path / "b")
    assert [row.key for row in new.values() if not row.augmentation] == [row.key for row in kept]
    for row in new.values():
        if not row.augmentation:
            assert row.sources == []
            for name, value in source[row.key].values.items():
                assert np.array_equal(row.values[name], value), name
            continue
        assert set(row.sources) <= {one.key for one in kept} and row.maps is None
        left = set(np.unique(row.mask).tolist()) - {0, 255}
        assert set(row.class_ids) == left and row.class_ids == sorted(row.class_ids)
        assert row.classes == [{12: "dog", 7: "car"}[number] for number in row.class_ids]
        for number, quality in zip(row.class_ids, row.quality, strict=True):
            assert quality == min(
                dict(zip(source[key].class_ids, source[key].quality, strict=True)).get(number, 2) for key in row.sources
            )
        if row.augmentation.startswith("splice"):
            assert (row.prompt, row.negative_prompt) == ("", "")
        else:
            assert row.key.startswith(f"{row.sources[0]}.") and row.prompt == source[row.sources[0]].prompt
    manifest = json.loads((tmp_path / "b" / "dataset.json").read_text())
    assert manifest["plan"]["rows"] == 42 and manifest["plan"]["shards"] == 9
    assert manifest["source"] == {"plan": drifted["plan"], "drift": drifted["drift"]} and "drift" not in manifest
    recorded = {"seed": 0, "originals": True, "all": False, **dataclasses.asdict(HOW)}
    assert manifest["options"] == {"seed": 0, "shard_size": 5, "augment": recorded}


def test_pixels_are_those_of_the_named_sources(tmp_path):
    source = rows(dataset(tmp_path / "a"))
    augmented(tmp_path / "a", tmp_path / "b")
    for row in rows(tmp_path / "b").values():
        parts = [(source[key].image, source[key].mask) for key in row.sources]
        kind, _, note = row.augmentation.partition(" ")
        if kind == "splice":
            expected = splice(parts, tuple(map(int, note.split("x"))))
            assert np.array_equal(row.image, expected[0]) and np.array_equal(row.mask, expected[1])
        if kind == "blur":
            blurred = gaussian_blur(torch.from_numpy(parts[0][0])[None], [int(note)])[0]
            assert np.array_equal(row.image, blurred.numpy()) and np.array_equal(row.mask, parts[0][1])
        if kind == "occlude":
            other = (row.image == parts[1][0]).all(-1)
            assert ((row.image == parts[0][0]).all(-1) | other).all()
            assert np.array_equal(row.mask[~other], parts[0][1][~other])
            assert np.array_equal(row.mask[other], parts[1][1][other])
        if kind == "perspective":
            outside = ~row.image.any(-1)
            assert 0 < outside.mean() < 0.7 and (row.mask[outside] == 255).all()


def test_run_again_killed_or_on_one_thread_it_gives_the_same_bytes(tmp_path):
    source = dataset(tmp_path / "a")
    augmented(source, tmp_path / "whole")
    for call in (1, 2, 3):
        kill_at(call, augmented, source, tmp_path / "b")
    augmented(source, tmp_path / "b")
    assert contents(tmp_path / "b") == contents(tmp_path / "whole")
    (tmp_path / "b" / "data" / "shard-00002.parquet").unlink()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    augmented(source, tmp_path / "b")
    assert contents(tmp_path / "b") == contents(tmp_path / "whole") and torch.get_num_threads() == 1
    torch.set_num_threads(threads)


def test_another_seed_or_option_is_named(tmp_path):
    source = dataset(tmp_path / "a")
    augmented(source, tmp_path / "b")
    before = contents(tmp_path / "b")
    with pytest.raises(DiffuMaskError, match="other options: `seed` was 0 and is 1 now; use another folder"):
        augmented(source, tmp_path / "b", seed=1)
    with pytest.raises(DiffuMaskError, match="`blur` was 0.5 and is 1.0 now; use"):
        augmented(source, tmp_path / "b", dataclasses.replace(HOW, blur=1))
    with pytest.raises(DiffuMaskError, match="plan.sha256 was"):
        augmented(dataset(tmp_path / "c", num=13), tmp_path / "b", all=False)
    assert contents(tmp_path / "b") == before
    augmented(source, tmp_path / "d", seed=1)
    assert contents(tmp_path / "d")["data/shard-00001.parquet"] != before["data/shard-00001.parquet"]


def test_shards_made_of_another_dataset_are_not_taken(tmp_path):
    augmented(dataset(tmp_path / "a"), tmp_path / "b")
    augmented(dataset(tmp_path / "c", negative_prompt="blurry"), tmp_path / "d")
    shard = "data/shard-00002.parquet"
    (tmp_path / "b" / shard).write_bytes((tmp_path / "d" / shard).read_bytes())
    with pytest.raises(DiffuMaskError, match="shard-00002.parquet .* was not written for its place"):
        augmented(tmp_path / "a", tmp_path / "b")


def test_classes_are_those_that_are_left(tmp_path):
    source = rows(dataset(tmp_path / "a"))
    how = AugmentationOptions("none", blur=0, occlude=1, occlude_area="1-1", perspective=0)
    augmented(tmp_path / "a", tmp_path / "b", how, originals=False)
    made = rows(tmp_path / "b").values()
    assert {source[row.sources[0]].classes == row.classes for row in made} == {True, False}
    assert all(row.classes == source[row.sources[1]].classes for row in made)


def test_rejected_rows_and_rows_without_the_originals(tmp_path):
    source = rows(dataset(tmp_path / "a"))
    augmented(tmp_path / "a", tmp_path / "b", all=True, originals=False)
    new = rows(tmp_path / "b").values()
    assert len(new) == 4 + 5 + 6 + 9 + 18 and all(row.augmentation for row in new)
    assert any(not row.accepted for row in new)
    for row in new:
        reasons = [source[key].reason for key in row.sources if not source[key].accepted]
        assert row.accepted == (not reasons) and row.reason == (reasons[0] if reasons else "")


def test_a_mask_of_which_nothing_is_left_is_rejected(tmp_path):
    def change(sample):
        sample.mask[:] = 0
        sample.mask[0, 0] = sample.request.class_ids[0]
        return sample

    how = AugmentationOptions("none", "same", 0, "6-22", 0, "0-1", 1, 0.24)
    augmented(dataset(tmp_path / "a", change, 40), tmp_path / "b", how)
    lost = [row for row in rows(tmp_path / "b").values() if not row.accepted]
    assert lost and all(row.reason == NOTHING_LEFT and not set(np.unique(row.mask)) - {0, 255} for row in lost)
    assert all(len(row.classes) == 1 for row in lost)


def test_full_splices_grow_and_are_bounded(tmp_path):
    how = AugmentationOptions(splice="2x3=0.5", splice_size="full", blur=0, occlude=0, perspective=0)
    augmented(dataset(tmp_path / "a"), tmp_path / "b", how, originals=False)
    assert {row.image.shape for row in rows(tmp_path / "b").values()} == {(48, 120, 3)}
    with pytest.raises(DiffuMaskError, match="splice 2x3 of 48x120 pixels cannot be made.*the whole may have 5000"):
        augmented(tmp_path / "a", tmp_path / "c", how, reading=ReadOptions(5000))


def test_datasets_that_cannot_be_augmented(tmp_path):
    augmented(dataset(tmp_path / "a"), tmp_path / "b")
    with pytest.raises(DiffuMaskError, match="b is augmented already: augment the dataset that it was made of"):
        augmented(tmp_path / "b", tmp_path / "c")
    nothing = dataset(tmp_path / "none", lambda sample: dataclasses.replace(sample, accepted=False, reason="no"))
    with pytest.raises(DiffuMaskError, match="holds no row to augment: let rejected rows count by `all`"):
        augmented(nothing, tmp_path / "c")
    alone = dataset(tmp_path / "alone", num=2)
    assert sum(row.accepted for row in rows(alone).values()) == 1
    with pytest.raises(DiffuMaskError, match="there is one alone: add images, or do without occlusion"):
        augmented(alone, tmp_path / "c")
    with pytest.raises(DiffuMaskError, match="no image would be made"):
        augmented(alone, tmp_path / "c", AugmentationOptions("none", blur=0, occlude=0, perspective=0), originals=False)
    with pytest.raises(DiffuMaskError, match="one folder, or one lies in the other"):
        augmented(tmp_path / "a", tmp_path / "a" / "new")
    assert not (tmp_path / "c").exists()
    augmented(alone, tmp_path / "c", AugmentationOptions("2x2=1", blur=1, occlude=0, perspective=1))
    assert [row.augmentation.split()[:1] for row in rows(tmp_path / "c").values()] == [
        [], ["blur"], ["perspective"], ["splice"],
    ]  # fmt: skip


def test_the_command(tmp_path):
    dataset(tmp_path / "a")
    command = ["augment", str(tmp_path / "a"), str(tmp_path / "b"), "--splice", "2x2=0.4", "--blur", "1"]
    said = CliRunner().invoke(app, command)
    assert said.exit_code == 0 and "images accepted. Look at" in said.stdout
    found = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert found["images"] == found["accepted"] == 9 + 4 + 9 + 2 + 2


def test_keys_that_are_there_already():
    names = [("dog-1", 0), ("dog-1.blur-0", 1)]
    with pytest.raises(DiffuMaskError, match="two rows would have one key"):
        plan_rows(names, AugmentOptions("in", "out", AugmentationOptions(blur=1)))


def test_what_is_made_of_an_augmented_dataset_keeps_its_columns(tmp_path):
    augmented(dataset(tmp_path / "a"), tmp_path / "b")
    derive(tmp_path / "b", tmp_path / "c", lambda some: ({**row.values} for row in some), MaskOptions())
    before, after = rows(tmp_path / "b"), rows(tmp_path / "c")
    assert [(row.augmentation, row.sources) for row in before.values()] == [
        (row.augmentation, row.sources) for row in after.values()
    ]
    with pytest.raises(DiffuMaskError, match="stores no maps to make masks of"):
        remask(tmp_path / "b", tmp_path / "d")


@pytest.mark.parametrize("drawn", [True, False])
def test_what_is_made_of_drawn_images_is_marked_as_drawn(tmp_path, drawn):
    with open_run(tmp_path / "a", requests(6), {"seed": 0}, {}, 6, vocabulary=Vocabulary.parse("dog,car")) as run:
        run.write_rows(0, [make_row(dataclasses.replace(draw(request), drawn=drawn)) for request in run.requests_of(0)])
    augmented(tmp_path / "a", tmp_path / "b")
    marked = [is_drawn(row.values["image"]["bytes"]) for row in rows(tmp_path / "b").values()]
    assert len(marked) > 12 and set(marked) == {drawn}


def test_others_read_it(tmp_path):
    augmented(dataset(tmp_path / "a"), tmp_path / "b")
    table = load_dataset("parquet", data_files=str(tmp_path / "b/data/*.parquet"), cache_dir=str(tmp_path))
    first, own = table["train"][1], list(rows(tmp_path / "b").values())[1]
    assert first["augmentation"] == own.augmentation and first["sources"] == own.sources
    assert isinstance(first["image"], Image.Image) and np.array_equal(np.array(first["mask"]), own.mask)
    assert len(open_data(tmp_path / "b")) == 42
    (row, *_) = read_rows(tmp_path / "b", columns=["augmentation"])
    assert row.values.keys() == {"augmentation", "accepted"}


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"splice": "2x2"}, "`splice` must be none, or grids .rows x columns. with their shares"),
        ({"splice": "2x2=0.1,2x2=0.1"}, "`splice` must be"),
        ({"splice": "1x1=0.1"}, "`splice` must be"),
        ({"splice": "2x2=1/0"}, "`splice` must be"),
        ({"splice": "2x2=-1"}, "`splice` must be"),
        ({"splice": "2x2=nan"}, "`splice` must be"),
        ({"splice": "1000x2=0.1"}, "`splice` must be"),
        ({"splice_size": "half"}, "`splice_size` must be one of same, full"),
        ({"blur": -0.1}, "`blur` must be a number from 0 to 100"),
        ({"blur_lengths": "22-6"}, "`blur_lengths` must be two numbers LOW-HIGH between 1 and 128, such as 6-22"),
        ({"blur_lengths": "6"}, "`blur_lengths` must be"),
        ({"occlude_area": "0.5-1.5"}, "`occlude_area` must be two numbers LOW-HIGH between 0 and 1"),
        ({"occlude_area": "nan-1"}, "`occlude_area` must be"),
        ({"perspective_shift": 0.25}, "`perspective_shift` must be a number from 0 to 0.24"),
    ],
)
def test_options_that_are_not_allowed(changes, sentence):
    with pytest.raises(DiffuMaskError, match=sentence):
        AugmentationOptions(**changes)


def test_options_have_one_form():
    options = AugmentationOptions(splice=" 2x2=0.05, 3x3=1/15", blur="1", blur_lengths=(6, 22), occlude_area="0.10-0.5")
    assert options.splice == "2x2=1/20,3x3=1/15" and options.blur == 1.0
    assert options.blur_lengths == "6-22" and options.occlude_area == "0.1-0.5"
    assert AugmentationOptions(splice="0").splice == AugmentationOptions(splice="").splice == "none"
    default = AugmentationOptions()
    assert default == AugmentationOptions(**dataclasses.asdict(default))
