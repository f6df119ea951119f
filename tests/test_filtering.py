"""learning/filtering.py: what ranks lowest in its class is rejected, and nothing else changes."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from learning_samples import dataset, tiny_model
from planted_noise import KINDS, plant, spoil
from samples import contents
from typer.testing import CliRunner

from diffumask_fast.cli import app
from diffumask_fast.dataset.reader import read_rows
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.augment import augment
from diffumask_fast.learning.cross_validation import Part, deal
from diffumask_fast.learning.data import open_data
from diffumask_fast.learning.filtering import filter_dataset, rank
from diffumask_fast.learning.options import AugmentOptions, FilterOptions, LearnOptions, PruneOptions
from diffumask_fast.learning.segmenters import read_record
from diffumask_fast.learning.training import _digest


def rows(folder):
    return {row.key: row for row in read_rows(folder, accepted_only=False)}


def test_the_lowest_share_of_each_class_is_pruned():
    scores = {f"a{n}": {"dog": n / 10} for n in range(10)} | {"b0": {"cat": 0.5}, "b1": {"cat": 0.4, "dog": 0.95}}
    verdicts = rank(scores, 0.3)  # 3.3 of 11 dogs, 0.6 of 2 cats
    assert {key for key, given in verdicts.items() if any(one.pruned for one in given)} == {"a0", "a1", "a2", "b1"}
    assert verdicts["a4"] == [("dog", 5, 11, 0.4, False)]
    assert [one[:3] for one in verdicts["b1"]] == [("cat", 1, 2), ("dog", 11, 11)]
    assert sum(one.pruned for given in rank(scores, 0.7).values() for one in given) == 8 + 1
    hundred = rank({str(n): {"dog": n} for n in range(100)}, 0.29)  # 0.29 * 100 is a little less than 29
    assert sum(given[0].pruned for given in hundred.values()) == 29
    assert not rank({"a": {"dog": 0.0}}, 0.9)["a"][0].pruned  # a class never goes as a whole
    equal = rank({name: {"dog": 0.5} for name in "bca"}, 0.4)
    assert equal["a"][0].pruned and not equal["b"][0].pruned


def test_by_quality(tmp_path):
    source = dataset(tmp_path / "in", num=14, classes="dog,car")
    summary = filter_dataset(FilterOptions(source, tmp_path / "out", PruneOptions(alpha=0.5, rank="quality")))
    before, after = rows(source), rows(tmp_path / "out")
    accepted = {key: row for key, row in before.items() if row.accepted}
    for name in ("dog", "car"):
        ranked = sorted((row.quality[0], key) for key, row in accepted.items() if row.classes == [name])
        gone = [key for _, key in ranked[: len(ranked) // 2]]
        assert {key for key in accepted if accepted[key].classes == [name] and not after[key].accepted} == set(gone)
        assert after[gone[0]].reason == (
            f"pruned: rank from the worst 1 of {len(ranked)} {name}, quality {ranked[0][0]:.3f}"
        )
        row = summary["per_class"][name]
        assert (row["images"], row["pruned"]) == (len(ranked), len(gone))
        assert row["lowest_kept"] == pytest.approx(ranked[len(gone)][0])
    assert summary["pruned"] == len(accepted) - summary["accepted"]
    kept = set(next(iter(before.values())).values) - {"accepted", "reason"}
    assert all(np.array_equal(before[key].values[name], after[key].values[name]) for key in before for name in kept)
    assert all(after[key].reason == row.reason for key, row in before.items() if not row.accepted)


def coloured(sample, spoil=True):
    """A rectangle whose colour is its class; its mask is spoiled in four of the samples."""
    number, value = sample.request.seed % 1000, sample.request.class_ids[0]
    top, left = 2 + number % 6, 3 + 2 * number % 11
    sample.mask[:] = 0
    sample.mask[top : top + 14, left : left + 20] = value
    sample.image[:] = 40
    sample.image[sample.mask == value] = (220, 40, 40) if value == 12 else (40, 40, 220)
    sample.accepted, sample.reason = True, ""
    spoilt = {"dog-000001": "empty", "dog-000004": "shift", "car-000002": "swap", "car-000005": "empty"}
    kind = spoilt.get(sample.request.key) if spoil else None
    if kind == "empty":
        sample.mask[:] = 0
    elif kind == "shift":
        sample.mask[:] = np.roll(sample.mask, 12, 1)
    elif kind == "swap":
        sample.mask[:] = 0
        sample.mask[-6:, -6:] = value
    return sample


def test_planted_noise_is_found_by_cross_validation(tmp_path):
    source = dataset(tmp_path / "in", num=24, change=coloured)
    learning = LearnOptions(segmenter=str(tiny_model("segformer", tmp_path / "start")), steps=60, batch_size=8, lr=1e-2)
    options = FilterOptions(source, tmp_path / "out", PruneOptions(2 / 12, learning=learning), device="cpu")
    summary = filter_dataset(replace(options, export_cleanlab=tmp_path / "issues.npz"))
    gone = {key for key, row in rows(tmp_path / "out").items() if not row.accepted}
    assert gone == {"dog-000001", "dog-000004", "car-000002", "car-000005"}
    assert summary["pruned"] == 4 and np.load(tmp_path / "issues.npz")["pred_probs"].shape == (24, 3, 24, 40)
    before = contents(tmp_path / "out")
    assert filter_dataset(options) == summary and contents(tmp_path / "out") == before
    recorded = json.loads((tmp_path / "out" / "dataset.json").read_text())["options"]["filter"]
    assert recorded["folds"] == 3 and recorded["learning"]["steps"] == 60


def test_the_last_round_learns_without_what_ranked_lowest(tmp_path):
    source = dataset(tmp_path / "in", num=24, change=coloured)
    learning = LearnOptions(segmenter=str(tiny_model("segformer", tmp_path / "start")), steps=3, batch_size=2)
    options = FilterOptions(source, tmp_path / "out", PruneOptions(0.5, learning=learning), device="cpu")
    filter_dataset(options)
    folds, data = tmp_path / "out" / "folds", open_data(source)
    scores = json.loads((folds / "round-1" / "scores.json").read_text())
    low = {key for key, given in rank(scores, 0.3).items() if given[0].pruned}  # 0.5 would leave too few
    fold_of = deal([[row.classes[0]] for row in rows(source).values()], 3, 0)
    assert len(low) == 8 and not (folds / "round-2" / "scores.json").exists()
    for fold in range(3):
        first, last = (read_record(folds / f"round-{number}" / f"fold-{fold}")["plan"] for number in (1, 2))
        seen = [number for number in range(24) if fold_of[number] != fold]
        kept = [number for number in seen if data.names[number] not in low]
        assert (first["steps"], last["steps"]) == (2, 3)
        assert first["data"] == [_digest(Part(data, seen))] and last["data"] == [_digest(Part(data, kept))]
    before = contents(tmp_path / "out")
    shutil.rmtree(folds / "round-2")  # as if it was stopped there
    assert filter_dataset(options)["pruned"] == 12 and contents(tmp_path / "out") == before
    for changed, named in (
        (PruneOptions(0.1), "`alpha` was 0.5 and is 0.1"),
        (PruneOptions(0.5, rounds=3), "`rounds` was 2"),
    ):
        with pytest.raises(DiffuMaskError, match=f"begun with other options: {named}"):
            filter_dataset(replace(options, pruning=replace(changed, learning=learning)))
    once = FilterOptions(source, tmp_path / "once", PruneOptions(0.5, rounds=1, learning=learning), device="cpu")
    filter_dataset(once)
    assert read_record(tmp_path / "once" / "folds" / "round-1" / "fold-0")["plan"]["steps"] == 3


def test_masks_are_spoiled_as_they_are_said_to_be(tmp_path):
    mask = np.zeros((60, 80), np.uint8)
    mask[20:40, 30:60] = 12
    for seed in range(20):
        shifted, swapped, eroded, emptied = (spoil(mask, kind, 7, np.random.default_rng(seed)) for kind in KINDS)
        down, right = np.nonzero(shifted)
        assert abs(down.min() - 20) >= 5 and abs(right.min() - 30) >= 7 and set(np.unique(shifted)) == {0, 12}
        assert np.array_equal(swapped == 7, mask == 12) and not (swapped == 12).any() and not emptied.any()
        assert 0 < (eroded == 12).sum() <= (mask == 12).sum() / 2 and not ((eroded > 0) & (mask == 0)).any()

    def accepted(sample):
        return coloured(sample, spoil=False)

    source = dataset(tmp_path / "in", num=40, change=accepted)
    kinds = plant(source, tmp_path / "out", 0.3, seed=1)
    before, after = rows(source), rows(tmp_path / "out")
    assert len(kinds) == 12 and set(kinds.values()) == set(KINDS)
    changed = {key for key in before if not np.array_equal(before[key].mask, after[key].mask)}
    assert changed == set(kinds)
    renamed = {key for key in before if before[key].classes != after[key].classes}
    assert renamed == {key for key, kind in kinds.items() if kind == "swapped"}


def test_what_cannot_be_filtered_is_one_sentence(tmp_path):
    source = dataset(tmp_path / "in", num=4)
    with pytest.raises(DiffuMaskError, match="`export_cleanlab` needs predictions"):
        filter_dataset(
            FilterOptions(source, tmp_path / "a", PruneOptions(rank="quality"), export_cleanlab=tmp_path / "b.npz")
        )
    with pytest.raises(DiffuMaskError, match="images for 3 folds, and a fold would be without it"):
        filter_dataset(FilterOptions(source, tmp_path / "a"))
    theirs = tmp_path / "theirs.npz"
    theirs.write_bytes(b"something")
    enough = dataset(tmp_path / "enough", num=24)
    with pytest.raises(DiffuMaskError, match="was not written by this program"):
        filter_dataset(FilterOptions(enough, tmp_path / "a", export_cleanlab=theirs), progress=None)
    assert not (tmp_path / "a").exists()  # no segmenter was trained for it
    augment(AugmentOptions(enough, tmp_path / "more"))
    with pytest.raises(
        DiffuMaskError, match="more is augmented.*: filter the dataset that it was made of, then augment"
    ):
        filter_dataset(FilterOptions(tmp_path / "more", tmp_path / "a"))
    assert filter_dataset(FilterOptions(tmp_path / "more", tmp_path / "a", PruneOptions(rank="quality")))["pruned"]
    with pytest.raises(DiffuMaskError, match="holds another dataset"):
        filter_dataset(FilterOptions(source, dataset(tmp_path / "c")))
    with pytest.raises(DiffuMaskError, match="one folder"):
        filter_dataset(FilterOptions(source, source))
    with pytest.raises(DiffuMaskError, match="`alpha` must be"):
        PruneOptions(alpha=1)


def test_filter_as_a_command(tmp_path):
    source = dataset(tmp_path / "in")
    words = ["filter", str(source), str(tmp_path / "out"), "--rank", "quality", "--alpha", "0.5"]
    table = CliRunner().invoke(app, words)
    assert table.exit_code == 0 and "lowest kept" in table.stdout and "images accepted" in table.stdout, table.output
    made = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert made["pruned"] == sum(row["pruned"] for row in made["per_class"].values())
