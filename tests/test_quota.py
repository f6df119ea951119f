"""generation/quota.py: rounds are a function of what is drawn, end, and are the same after a kill."""

import json
import random
import shutil
from pathlib import Path

import fsspec
import pytest
from killed import kill_at
from samples import contents
from test_generation import options, silent

from diffumask_fast.cli import app
from diffumask_fast.console import run_program
from diffumask_fast.dataset.reader import read_manifest, read_rows, shard_paths
from diffumask_fast.dataset.remask import remask
from diffumask_fast.dataset.shard_check import finished_shards
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.generation.generate import run_generate
from diffumask_fast.generation.probe import run_probe
from diffumask_fast.generation.quota import (
    HOPELESS,
    PROBE,
    Tally,
    below,
    explain_below,
    first_round,
    next_round,
    tally,
)
from diffumask_fast.masks.options import MaskOptions


def simulate(shares, quota, shard_size, seed=0):
    """Draw rounds in which each class has its share of accepted images; return the tallies and the rounds."""
    rng = random.Random(seed)
    tallies, rounds = [Tally(str(share)) for share in shares], []
    counts = first_round(len(shares), quota, shard_size)
    while counts:
        rounds.append(counts)
        for one, share, count in zip(tallies, shares, counts, strict=True):
            one.drawn += count
            one.accepted += sum(rng.random() < share for _ in range(count))
        counts = next_round(tallies, quota, shard_size)
    return tallies, rounds


@pytest.mark.parametrize("quota, shard_size", [(1, 1), (3, 64), (50, 7), (500, 64)])
def test_rounds_are_whole_shards_and_end(quota, shard_size):
    shares = [1.0, 0.7, 0.3, 0.15, 0.0]
    tallies, rounds = simulate(shares, quota, shard_size)
    assert all(sum(counts) % shard_size == 0 for counts in rounds)
    assert [one.name for one in below(tallies, quota) if not one.is_hopeless] == []
    assert tallies[0].accepted >= quota and tallies[1].accepted >= quota and tallies[4].accepted == 0
    for one in tallies:
        most = max(PROBE, HOPELESS * quota)
        assert one.drawn <= 5 * most + len(rounds) * shard_size
    assert simulate(shares, quota, shard_size)[1] == rounds


def test_a_class_that_has_its_number_is_drawn_no_more():
    tallies = [Tally("a", 40, 30), Tally("b", 40, 20), Tally("c", 40, 3), Tally("d", 39, 0)]
    assert next_round(tallies, 30, 1) == (0, 20, 0, 4 * 39)
    assert next_round(tallies, 30, 50) == (0, 20 + 12, 0, 4 * 39 + 12)
    assert next_round(tallies[:1], 30, 50) == ()
    assert first_round(3, 5, 4) == (6, 5, 5) and first_round(2, 10**6, 1) == (PROBE, PROBE)


def test_the_sentence_names_classes_reasons_and_what_to_do():
    one = Tally("dog", 40, 3)
    one.reasons.update({"quality below `min_quality`": 30, "no pixel in the mask": 7})
    text = explain_below([one], 20, MaskOptions(min_quality=0.9))
    assert "dog (3 of 40 accepted, most often: quality below `min_quality`)" in text
    assert "lower `min_quality`, leave them out" in text
    assert "lower" not in explain_below([one], 20, MaskOptions())
    assert ") and 3 more classes; the dataset" in explain_below([one] * 8, 20, MaskOptions())


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(num=6), "give one of the two"),
        (dict(classes_per_image=2), "leave out `classes_per_image`"),
        (dict(accept_per_class=0), "whole number from 1"),
        (dict(part="0/2"), "one process decides the rounds of `accept_per_class`: leave out `part`"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(tmp_path, given, words):
    with pytest.raises(DiffuMaskError, match=words):
        options(tmp_path, "mini", **dict(num=None, accept_per_class=2) | given)


LIMITS = dict(num=None, accept_per_class=6, mask=MaskOptions(min_quality=0.05))


def draw(folder: Path, model: Path, **changes):
    return run_generate(options(folder, model, **LIMITS | changes), silent)


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("quota") / "out"
    return out, draw(out, tiny_folder)


def test_each_class_has_its_number_and_the_dataset_is_one(finished, tiny_folder, tmp_path):
    out, summary = finished
    manifest, rows = read_manifest(out), list(read_rows(out, accepted_only=False))
    rounds = manifest["plan"]["rounds"]
    assert len(rounds) > 1 and manifest["options"]["accept_per_class"] == 6 and "num" not in manifest["options"]
    assert [part["rows"] for part in rounds][-1] == len(rows) == summary["images"] == summary["drawn"]
    tallies = {one.name: one for one in tally(rows, ["dog", "cat"])}
    assert all(one.accepted >= 6 for one in tallies.values()) and summary["below_quota"] == []
    assert len({row.key for row in rows}) == len(rows)
    last = rows[rounds[-2]["rows"] :]
    assert {row.classes[0] for row in last} == set(rounds[-1]["classes"])
    assert len(finished_shards(out, manifest)) == manifest["plan"]["shards"]
    assert remask(out, tmp_path / "new")["images"] == len(rows)
    assert len(finished_shards(tmp_path / "new", read_manifest(tmp_path / "new"))) == manifest["plan"]["shards"]


def test_a_sample_is_the_one_that_a_number_of_images_gives(finished, tiny_folder, tmp_path):
    run_generate(options(tmp_path / "out", tiny_folder, num=4, mask=LIMITS["mask"]), silent)
    first = list(read_rows(finished[0], accepted_only=False))[:4]
    assert [row.values["image"] for row in first] == [
        row.values["image"] for row in read_rows(tmp_path / "out", accepted_only=False)
    ]


def test_a_finished_run_is_left_alone_and_another_number_is_named(finished, tiny_folder):
    out, _ = finished
    before = contents(out)
    assert draw(out, tiny_folder)["drawn"] == 0 and contents(out) == before
    with pytest.raises(DiffuMaskError, match="`accept_per_class` was 6 and is 7 now"):
        draw(out, tiny_folder, accept_per_class=7)
    with pytest.raises(DiffuMaskError, match="`accept_per_class` was 6 and is not set now"):
        draw(out, tiny_folder, accept_per_class=None, num=6)
    assert contents(out) == before


def test_rounds_in_an_object_store_are_those_of_a_folder(finished, tiny_folder, tmp_path):
    address = f"memory://quota-{tmp_path.name}"
    assert draw(address, tiny_folder)["below_quota"] == []
    assert read_manifest(address) == read_manifest(finished[0])
    there, here = (list(read_rows(where, accepted_only=False)) for where in (address, finished[0]))
    assert [row.values["image"] for row in there] == [row.values["image"] for row in here]
    fsspec.filesystem("memory").rm_file(str(shard_paths(address)[-1]).removeprefix("memory:/"))
    assert draw(address, tiny_folder)["drawn"] == 4 and run_probe(options(address, tiny_folder, **LIMITS))["is_least"]


@pytest.mark.parametrize("lost", ["last", "first"])
def test_a_lost_shard_is_drawn_anew(finished, tiny_folder, tmp_path, lost):
    out = shutil.copytree(finished[0], tmp_path / "out")
    shards = sorted((out / "data").iterdir())
    shards[-1 if lost == "last" else 0].unlink()
    assert draw(out, tiny_folder)["drawn"] == 4 and contents(out) == contents(finished[0])


def test_a_run_without_its_last_round_goes_on(finished, tiny_folder, tmp_path):
    """As a run is left that was killed before it wrote down the next round."""
    out = shutil.copytree(finished[0], tmp_path / "out")
    manifest = read_manifest(out)
    *rounds, last = manifest["plan"]["rounds"]
    for index in range(rounds[-1]["shards"], last["shards"]):
        (out / "data" / f"shard-{index:05d}.parquet").unlink()
    manifest["plan"] = {**{name: rounds[-1][name] for name in ("rows", "shards", "sha256")}, "rounds": rounds}
    (out / "dataset.json").write_text(json.dumps(manifest))
    assert draw(out, tiny_folder)["drawn"] == last["rows"] - rounds[-1]["rows"]
    assert contents(out)["data/shard-00003.parquet"] == contents(finished[0])["data/shard-00003.parquet"]
    assert read_manifest(out) == read_manifest(finished[0])


@pytest.mark.parametrize("call", [5, *(pytest.param(call, marks=pytest.mark.slow) for call in (1, 2, 3, 4, 6, 7, 8))])
def test_a_killed_run_ends_with_the_same_bytes(finished, tiny_folder, tmp_path, call):
    kill_at(call, draw, tmp_path / "out", tiny_folder)
    draw(tmp_path / "out", tiny_folder)
    assert contents(tmp_path / "out") == contents(finished[0])


def test_a_hopeless_class_ends_the_run_and_what_is_drawn_stays(tiny_folder, tmp_path, capsys):
    picky = dict(
        accept_per_class=8, classes="cat,dog", shard_size=64, mask=MaskOptions(min_quality=0.135), batch_size=8
    )
    summary = draw(tmp_path / "out", tiny_folder, **picky)
    assert summary["below_quota"] == ["dog"] and "dog (" in summary["why_below_quota"]
    tallies = tally(read_rows(tmp_path / "out", accepted_only=False, columns=["classes", "reason"]), ["cat", "dog"])
    assert tallies[0].accepted >= 8 and tallies[1].is_hopeless and tallies[1].drawn < 4 * PROBE
    before = contents(tmp_path / "out")
    flags = ["--accept-per-class", 8, "--classes", "cat,dog", "--min-quality", 0.135, "--batch-size", 8, "--steps", 2]
    command = ["generate", tmp_path / "out", "--model", tiny_folder, "--device", "cpu", *flags, "--json"]
    with pytest.raises(SystemExit) as ended:
        run_program(app, list(map(str, command)))
    text = capsys.readouterr()
    assert ended.value.code == 3 and contents(tmp_path / "out") == before
    assert json.loads(text.out)["drawn"] == 0
    assert text.err == summary["why_below_quota"].replace("`min_quality`", "--min-quality") + "\n"


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan["rounds"][0].update(rows=5),
        lambda plan: plan["rounds"][0]["classes"].update(dog="2"),
        lambda plan: plan["rounds"].pop(),
        lambda plan: plan.update(rounds=[1]),
        lambda plan: plan["rounds"][0]["classes"].update(dog=-2, cat=99),
    ],
)
def test_rounds_that_are_none_are_refused(finished, tiny_folder, tmp_path, change):
    out = shutil.copytree(finished[0], tmp_path / "out")
    manifest = json.loads((out / "dataset.json").read_text())
    change(manifest["plan"])
    (out / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(DiffuMaskError, match="no manifest of a dataset|not those"):
        draw(out, tiny_folder)


def test_rounds_of_other_classes_are_not_those_of_the_run(finished, tiny_folder, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "out")
    text = (out / "dataset.json").read_text()
    (out / "dataset.json").write_text(text.replace('"cat": ', '"cow": '))
    with pytest.raises(DiffuMaskError, match="begun with other prompts"):
        draw(out, tiny_folder)
