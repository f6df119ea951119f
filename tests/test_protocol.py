"""bench/protocol.py: what is trained, in which order, and data made by the product's own functions."""

from collections import Counter

import numpy as np
import pytest

from diffumask_fast.bench.protocol import (
    CELLS,
    HEADLINE,
    UNSEEN,
    Scale,
    TrainingData,
    in_order,
    with_oracle_masks,
    without,
)
from diffumask_fast.dataset.reader import read_manifest, read_rows
from diffumask_fast.learning.data import open_data
from diffumask_fast.learning.metrics import binary_iou
from diffumask_fast.learning.options import LearnOptions
from diffumask_fast.mini.world import HOME, write_world

TOY = Scale(images=20, tests=6, steps=2, finetune_steps=1, ablation_steps=1, fold_steps=1)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = tmp_path_factory.mktemp("protocol") / "real"
    write_world(folder, 20, 5)
    return folder


def test_names_are_unique_and_the_headline_of_all_seeds_comes_first():
    order = [(cell.name, seed) for cell, seed in in_order(CELLS, 3)]
    assert max(Counter(order).values()) == 1 and len(order) == 3 * len(CELLS)
    first = order[: 3 * len(HEADLINE)]
    assert [name for name, _ in first] == [cell.name for cell in HEADLINE] * 3
    seeds = [seed for _, seed in order[len(first) :]]
    assert seeds == sorted(seeds)
    assert set(UNSEEN) < set(HOME)


def test_a_segmenter_is_trained_before_those_that_start_from_it():
    order = [(cell.name, seed) for cell, seed in in_order(CELLS, 2)]
    starts = [((cell.start, seed), (cell.name, seed)) for cell, seed in in_order(CELLS, 2) if cell.start]
    assert len(starts) == 6 and all(order.index(start) < order.index(name) for start, name in starts)


def test_the_oracles_masks_replace_those_that_are_there(real, tmp_path):
    with_oracle_masks(real, tmp_path / "oracle")
    before, after = (list(read_rows(folder, accepted_only=False)) for folder in (real, tmp_path / "oracle"))
    assert [row.key for row in before] == [row.key for row in after]
    ious = []
    for old, new in zip(before, after, strict=True):
        assert np.array_equal(old.image, new.image) and new.maps is None and new.accepted
        assert sorted(new.class_ids) == sorted(set(np.unique(new.mask).tolist()) - {0})
        assert len(new.quality) == len(new.classes)
        ious.append(binary_iou(old.mask > 0, new.mask > 0))
    assert 0.9 < np.mean(ious) < 1
    assert read_manifest(tmp_path / "oracle")["options"]["masks_by"] == "mini-oracle"


def test_an_image_in_which_the_oracle_sees_nothing_is_rejected(real, tmp_path, monkeypatch):
    nothing = [np.zeros((128, 128), np.uint8)]
    monkeypatch.setattr("diffumask_fast.bench.protocol.predict", lambda oracle, images: nothing * len(images))
    assert with_oracle_masks(real, tmp_path / "oracle")["accepted"] == 0
    assert {row.reason for row in read_rows(tmp_path / "oracle", accepted_only=False)} == {
        "mini-oracle sees nothing in it"
    }


def test_scenes_with_unseen_classes_are_rejected_and_the_classes_stay_known(real, tmp_path):
    without(real, tmp_path / "seen", UNSEEN)
    rows = list(read_rows(tmp_path / "seen", accepted_only=False))
    held = [bool(set(row.classes) & set(UNSEEN)) for row in rows]
    assert any(held) and [not row.accepted for row in rows] == held
    assert {row.reason.removeprefix("holds ") for row in rows if not row.accepted} <= set(UNSEEN)
    data = open_data(tmp_path / "seen")
    assert len(data) == held.count(False) and set(data.classes.values()) == {"background", *HOME}


def test_a_fifth_is_the_first_of_the_real_scenes(tmp_path):
    data = TrainingData(tmp_path, TOY, 1, LearnOptions(steps=1), "torch", None)
    real, fifth = (open_data(data.path(name)) for name in ("real", "fifth"))
    assert (len(real), len(fifth)) == (20, 4) and real.classes == fifth.classes
    for index in range(4):
        assert np.array_equal(real[index].image, fifth[index].image)
        assert np.array_equal(real[index].labels, fifth[index].labels)
    assert data.masks_iou("real") is None
    other = TrainingData(tmp_path / "other", TOY, 2, LearnOptions(steps=1), "torch", None)
    assert not np.array_equal(open_data(other.path("real"))[0].image, real[0].image)


def test_an_unknown_name_of_data(tmp_path):
    with pytest.raises(KeyError, match="nothing"):
        TrainingData(tmp_path, TOY, 0, LearnOptions(steps=1), "torch", None).path("nothing")
