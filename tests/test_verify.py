"""dataset/verify.py: every shard and row is read, all that is wrong is told, and memory stays flat."""

import dataclasses
import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from samples import contents, draw, requests
from test_cli import PROGRAM
from test_run import finish
from test_shard_check import FOREIGN, cut_off, empty, half_full

from diffumask_fast.dataset.reader import read_manifest
from diffumask_fast.dataset.remask import remask
from diffumask_fast.dataset.run import open_run
from diffumask_fast.dataset.schema import encode_png
from diffumask_fast.dataset.shard_check import mark_of
from diffumask_fast.dataset.verify import sentence, verify
from diffumask_fast.dataset.writer import shard_path, write_shard
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.augment import augment
from diffumask_fast.learning.options import AugmentationOptions, AugmentOptions
from diffumask_fast.prompts.vocabulary import Vocabulary


@pytest.fixture
def run(tmp_path):
    finish(tmp_path / "run")
    return tmp_path / "run"


def faults_of(folder):
    return [(fault["file"], fault["key"], fault["what"]) for fault in verify(folder)["faults"]]


def rewrite(folder, index, change):
    """Write a shard anew with the values of its rows changed, and its own mark."""
    rows = pq.read_table(shard_path(folder, index)).to_pylist()
    change(rows)
    names = [(row["key"], row["seed"]) for row in rows]
    write_shard(folder, index, rows, mark_of(read_manifest(folder), index, names))


def test_a_whole_dataset_has_no_faults(run):
    before = contents(run)
    accepted = sum(draw(request).accepted for request in requests(7))
    assert verify(run) == {"folder": str(run), "shards": 3, "images": 7, "accepted": accepted, "faults": []}
    assert contents(run) == before


def test_derived_datasets_have_no_faults(run, tmp_path):
    remask(run, tmp_path / "new")
    how = AugmentationOptions(splice="2x2=0.5", blur=0.5, occlude=0.5, perspective=0.5)
    augment(AugmentOptions(run, tmp_path / "more", augmentations=how, all=True))
    assert verify(tmp_path / "new")["faults"] == verify(tmp_path / "more")["faults"] == []
    assert verify(tmp_path / "more")["images"] > 7


def test_an_imported_dataset_has_no_faults(tmp_path):
    """As `import` writes it: no model, sizes of their own, no maps."""
    plan = requests(5)
    with open_run(tmp_path, plan, {"import": "voc"}, {}, 3, vocabulary=Vocabulary.parse("dog,car")) as folder:
        for index in folder.missing_shards():
            samples = [draw(request, 16 + 8 * number) for number, request in enumerate(folder.requests_of(index))]
            folder.write(index, [dataclasses.replace(sample, maps=None) for sample in samples])
    assert verify(tmp_path)["faults"] == []


@pytest.mark.parametrize("change", FOREIGN)
def test_what_is_not_of_this_run_is_a_fault(run, tmp_path, change):
    change(run, tmp_path)
    assert faults_of(run)


@pytest.mark.parametrize("damage", [cut_off, empty, half_full])
def test_a_damaged_shard_is_one_fault_beside_others(run, damage):
    path = shard_path(run, 1)
    path.write_bytes(damage(path.read_bytes()))
    shard_path(run, 2).unlink()
    (run / "data" / "notes.txt").write_text("mine")
    (run / "data" / ".shard-00002.parquet.tmp").write_text("half")
    found = faults_of(run)
    assert [file for file, _, _ in found] == [
        "data/.shard-00002.parquet.tmp", "data/notes.txt", "data/shard-00001.parquet", "data/shard-00002.parquet",
    ]  # fmt: skip
    assert "cannot be read" in found[2][2] and found[3][2] == "missing"


def of_no_class(row):
    row["class_ids"] = [200]


def of_a_strange_id(row):
    row["mask"]["bytes"] = encode_png(draw(requests(7, "sofa")[0]).mask)


def of_another_size(row):
    row["mask"]["bytes"] = encode_png(draw(requests(7)[0], 16).mask)


def cut_picture(row):
    row["image"]["bytes"] = row["image"]["bytes"][:-30]


def without_picture(row):
    row["mask"] = None


def without_a_map(row):
    row["map_sizes"] = row["map_sizes"] * 2


def without_quality(row):
    row["quality"] = []


def of_no_quality(row):
    row.update(quality=[float("nan")], accepted=True, reason="")


def rejected_in_silence(row):
    row.update(accepted=False, reason="")


WRONG = {
    of_no_class: "id 200 is not in the class list",
    of_a_strange_id: "holds the id 18, which is of none of the row's classes",
    of_another_size: "the mask has 16x40 pixels, the image 24x40",
    cut_picture: "cannot be decoded",
    without_picture: "mask is empty",
    without_a_map: "do not fit the map sizes",
    without_quality: "0 values of quality for 1 classes",
    of_no_quality: "quality of an accepted row is no number",
    rejected_in_silence: "a rejected row has no reason",
}


@pytest.mark.parametrize("change, words", WRONG.items())
def test_a_wrong_row_is_named(run, change, words):
    rewrite(run, 1, lambda rows: change(rows[1]))
    summary = verify(run)
    assert [(fault["file"], fault["key"]) for fault in summary["faults"]] == [
        ("data/shard-00001.parquet", "dog-000002")
    ]
    assert words in summary["faults"][0]["what"]
    assert sentence(summary).endswith(": delete the shard and run the command again that wrote the dataset")


def test_a_changed_prompt_is_noticed(run):
    rewrite(run, 1, lambda rows: rows[1].update(prompt="a photo of something else"))
    assert [what for _, _, what in faults_of(run)] == [
        "the rows are not those of the plan in dataset.json: a prompt changed"
    ]


def test_the_size_of_a_drawn_image_is_that_of_the_options(tmp_path):
    finish(tmp_path / "a", options={"size": "24x40"})
    finish(tmp_path / "b", options={"size": "64x64"})
    assert verify(tmp_path / "a")["faults"] == [] and len(verify(tmp_path / "b")["faults"]) == 7


def test_a_picture_past_the_limit_says_which_limit(run):
    summary = verify(run, max_pixels=900)
    assert len(summary["faults"]) == 7 and "`max_pixels`" in sentence(summary)


def test_older_shards_without_a_mark_pass(run):
    for index in range(3):
        write_shard(run, index, pq.read_table(shard_path(run, index)).to_pylist())
    assert verify(run)["faults"] == []


def test_no_dataset_is_one_sentence(tmp_path):
    with pytest.raises(DiffuMaskError, match="dataset.json is missing: name the folder that generate wrote"):
        verify(tmp_path)


def test_the_command_tells_all_faults_and_ends_with_one_sentence(run):
    def call(*arguments):
        done = subprocess.run([PROGRAM, "verify", *map(str, arguments)], capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    assert call(run)[:2] == (0, f"7 images in 3 shards, {verify(run)['accepted']} accepted: all is well.\n")
    rewrite(run, 1, lambda rows: [cut_picture(row) for row in rows[1:]])
    code, out, err = call(run)
    assert code == 1 and [line.split()[:2] for line in out.splitlines()] == [
        ["data/shard-00001.parquet", "dog-000002"], ["data/shard-00001.parquet", "car-000002"],
    ]  # fmt: skip
    assert err.count("\n") == 1 and f"{run}/data/shard-00001.parquet, dog-000002: dog-000002.png cannot be" in err
    assert "(the first of 2 faults in 1 file): delete the shard and run the command again" in err
    code, out, _ = call(run, "--json")
    assert code == 1 and len(json.loads(out)["faults"]) == 2


PEAK = """
import resource, sys
from diffumask_fast.dataset.verify import verify
assert verify(sys.argv[1])["faults"] == []
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_is_flat_over_100_000_rows(tmp_path):
    peaks = []
    for num in (10_000, 100_000):
        folder, plan = tmp_path / str(num), requests(num)
        with open_run(folder, plan, {}, {}, 1000, vocabulary=Vocabulary.parse("dog,car")) as run:
            for index in run.missing_shards():
                run.write(index, [draw(request, 16, 16) for request in run.requests_of(index)])
        peaks.append(int(subprocess.check_output([sys.executable, "-c", PEAK, str(folder)])))
    assert peaks[1] < 1.1 * peaks[0]
