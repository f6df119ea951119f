"""generation/rebuild.py: a sample's batch, drawn again, has the bytes that are stored, or its difference is told."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
import torch
from samples import draw, requests
from test_cli import call, refused
from test_generation import options, silent
from test_run import finish
from test_verify import rewrite

from diffumask_fast.borrow import patched_threads
from diffumask_fast.dataset.reader import read_manifest
from diffumask_fast.dataset.remask import remask
from diffumask_fast.dataset.schema import encode_png
from diffumask_fast.dataset.writer import shard_path
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.generation.generate import run_generate
from diffumask_fast.generation.job import make_job, open_pipe
from diffumask_fast.generation.options import RebuildOptions
from diffumask_fast.generation.rebuild import job_of, rebuild
from diffumask_fast.learning.augment import augment
from diffumask_fast.learning.options import AugmentOptions
from diffumask_fast.masks.options import MaskOptions


@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory):
    """Shards of 5 and 3 images, in batches of 2, 2, 1 and 2, 1."""
    asked = options(tmp_path_factory.mktemp("run") / "out", tiny_folder, num=8, shard_size=5)
    run_generate(asked, silent)
    return asked


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run.out, tmp_path / "copy")


@pytest.fixture
def where(tiny_folder):
    return RebuildOptions(model=str(tiny_folder), device="cpu")


def test_the_recorded_job_is_the_one_that_drew(run, where):
    manifest, pipe = read_manifest(run.out), open_pipe(run, "cpu")
    assert job_of(run.out, manifest, where) == make_job(run, pipe)


def test_every_batch_has_the_bytes_that_are_stored(run, where):
    keys = [row["key"] for index in (0, 1) for row in pq.read_table(shard_path(run.out, index)).to_pylist()]
    batches = [keys[:2], keys[2:4], keys[4:5], keys[5:7], keys[7:]]
    for batch in batches:
        told = rebuild(run.out, batch[-1], where)
        assert told["batch"] == batch and told["equal"] and told["differs"] == []
        assert told["mask_iou"] == told["batch_mask_iou"] == 1 and told["environment"] == {} and told["fault"] == ""


def test_the_threads_are_those_that_drew(run, where):
    threads = torch.get_num_threads()
    with patched_threads(threads + 1):
        assert rebuild(run.out, "dog-000000", where)["equal"]
        assert torch.get_num_threads() == threads + 1


def test_a_remasked_dataset_is_drawn_again_with_its_own_masks(run, where, tmp_path):
    remask(run.out, tmp_path / "new", MaskOptions(threshold=0.3, refine="none"))
    told = rebuild(tmp_path / "new", "cat-000001", where)
    assert told["equal"] and told["fault"] == ""


def test_a_filtered_dataset_is_compared_in_what_was_drawn(copy, where):
    manifest = json.loads((copy / "dataset.json").read_text())
    manifest["options"]["alpha"] = 0.7
    (copy / "dataset.json").write_text(json.dumps(manifest))
    rewrite(copy, 0, lambda rows: rows[0].update(accepted=False, reason="ranks low"))
    assert rebuild(copy, "dog-000000", where)["equal"]


def test_a_changed_row_is_a_fault_in_the_same_environment(copy, where):
    rewrite(copy, 0, lambda rows: rows[1].update(quality=[0.5]))
    told = rebuild(copy, "dog-000000", where)
    assert told["differs"] == [] and not told["equal"]
    assert "cat-000000, drawn again in the same environment, is not what is stored (quality)" in told["fault"]
    rewrite(copy, 0, lambda rows: rows[0]["image"].update(bytes=encode_png(draw(requests(1)[0], 64, 64).image)))
    told = rebuild(copy, "dog-000000", where)
    assert told["differs"] == ["image"] and "dog-000000 and 1 more of its batch" in told["fault"]
    assert told["fault"].endswith("; delete the shard and run the command again that wrote the dataset")


def test_elsewhere_the_masks_are_compared(copy, where):
    manifest = json.loads((copy / "dataset.json").read_text())
    manifest["environment"]["torch"] = "2.12.0"
    (copy / "dataset.json").write_text(json.dumps(manifest))
    rewrite(copy, 0, lambda rows: rows[1].update(quality=[0.5]))
    told = rebuild(copy, "dog-000000", where)
    assert list(told["environment"]) == ["torch"] and "2.12.0" in told["environment"]["torch"]
    assert not told["equal"] and told["batch_mask_iou"] == 1 and told["fault"] == ""
    rewrite(copy, 0, lambda rows: rows[1]["mask"].update(bytes=encode_png(draw(requests(1)[0], 64, 64).mask * 0)))
    told = rebuild(copy, "dog-000000", where)
    assert told["mask_iou"] == 1 and told["batch_mask_iou"] == 0.5 and "an IoU of 0.50" in told["fault"]


def test_a_shard_that_drifted_is_compared_with_its_own_environment(copy, where):
    manifest = json.loads((copy / "dataset.json").read_text())
    drift = [{"environment": {**manifest["environment"], "torch": "2.14.0"}, "shards": [1]}]
    (copy / "dataset.json").write_text(json.dumps({**manifest, "drift": drift}))
    assert rebuild(copy, "dog-000000", where)["environment"] == {}
    assert rebuild(copy, "cat-000003", where)["environment"].keys() == {"torch"}


def test_what_cannot_be_drawn_again_is_one_sentence(run, copy, where, tmp_path):
    finish(tmp_path / "imported")
    augment(AugmentOptions(run.out, tmp_path / "more", all=True))
    (tmp_path / "model").mkdir()
    other = shutil.copytree(where.model, tmp_path / "other")
    (other / "vae" / "config.json").write_text((other / "vae" / "config.json").read_text() + "\n")
    for folder, key, how, words in (
        (run.out, "cow-000000", where, "holds no sample cow-000000: give one of its keys"),
        (tmp_path / "imported", "dog-000000", where, "was not drawn by generate"),
        (tmp_path / "more", "dog-000000", where, "is augmented: redraw a sample of the dataset that it was made of"),
        (run.out, "dog-000000", RebuildOptions(device="cpu"), "has moved, name it by `model`"),
        (run.out, "dog-000000", RebuildOptions(model=str(other), device="cpu"), "the weights of .* are not those"),
        (tmp_path, "dog-000000", where, "dataset.json is missing"),
    ):
        with pytest.raises(DiffuMaskError, match=words) as caught:
            rebuild(folder, key, how)
        assert "\n" not in str(caught.value)
    rewrite(copy, 1, lambda rows: rows[1].update(prompt="a photo of something else"))
    with pytest.raises(DiffuMaskError, match="holds other samples than are planned now"):
        rebuild(copy, "cat-000002", where)


def test_the_command_redraws_and_says_what_came_out(run, copy, where):
    place = ["--model", where.model, "--device", "cpu"]
    done = call("verify", run.out, "--rebuild", "dog-000001", *place)
    assert done.stdout == "dog-000001 and its batch of 2, drawn again in the same environment: every byte is equal.\n"
    rewrite(copy, 0, lambda rows: rows[2].update(quality=[0.5]))
    text = refused("verify", copy, "--rebuild", "dog-000001", *place)
    assert "dog-000001, drawn again in the same environment, is not what is stored (quality)" in text
