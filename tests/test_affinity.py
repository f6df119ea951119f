"""learning/affinity.py: the command, from stored maps to masks, at a size that takes seconds."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from killed import kill_at
from learning_samples import dataset, tiny_model
from samples import contents
from typer.testing import CliRunner

from diffumask_fast.borrow import patched_threads
from diffumask_fast.cli import app
from diffumask_fast.dataset.reader import read_manifest, read_rows
from diffumask_fast.dataset.remask import remask
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.generation.rebuild import rebuild
from diffumask_fast.learning.affinity import AffinityMasks, make_affinity_masks
from diffumask_fast.learning.affinity_net import affinity_maps, load_affinity
from diffumask_fast.learning.augment import augment
from diffumask_fast.learning.options import AffinityLearning, AffinityMaskOptions, AffinityOptions, AugmentOptions
from diffumask_fast.learning.segmenters import read_record
from diffumask_fast.masks.make import make_masks
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.masks.threshold import otsu

SIDE, CELLS = 32, 8


def coloured(sample):
    """A rectangle of its class's colour on grey, and a soft map of it in which one side is faint."""
    number, value = sample.request.seed % 1000, sample.request.class_ids[0]
    top, left = 4 + number % 5, 5 + number % 7
    inside = np.zeros((SIDE, SIDE), bool)
    inside[top : top + 18, left : left + 16] = True
    sample.image[:] = 60
    sample.image[inside] = (220, 40, 40) if value == 12 else (40, 40, 220)
    share = inside.reshape(CELLS, SIDE // CELLS, CELLS, SIDE // CELLS).mean((1, 3))
    sample.maps = (255 * share * np.linspace(1, 0.5, CELLS)).astype(np.uint8)[None]
    sample.mask[:] = np.where(inside, value, 0)
    sample.accepted, sample.reason = True, ""
    return sample


def make(source: Path, out: Path, start: Path, **words) -> dict:
    learning = AffinityLearning(backbone=str(start), steps=2, batch_size=2, walk=8, **words)
    options = AffinityOptions(source, out, AffinityMaskOptions(affinity=learning), device="cpu", save_every=1)
    with patched_threads(1):
        return make_affinity_masks(options)


def plain(source: Path, start: Path, out: Path) -> None:
    make(source, out, start)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a dataset, a backbone to start from, and the folder that an undisturbed run leaves."""
    folder = tmp_path_factory.mktemp("made")
    source = dataset(folder / "in", num=5, change=coloured, height=SIDE, width=SIDE)
    start = tiny_model("segformer", folder / "start")
    make(source, folder / "out", start)
    return source, start, folder / "out"


def rows(folder):
    return list(read_rows(folder, accepted_only=False))


def test_only_masks_quality_and_acceptance_change(made):
    source, start, out = made
    for before, after in zip(rows(source), rows(out), strict=True):
        same = set(before.values) - {"mask", "quality", "accepted", "reason"}
        assert all(np.array_equal(before.values[name], after.values[name]) for name in same)
        assert set(np.unique(after.mask)) <= {0, *after.class_ids}
    recorded = read_manifest(out)["options"]
    assert recorded["threshold"] == "adaptive" and recorded["refine"] == "guided"
    assert recorded["affinity"]["backbone"] == str(start) and recorded["affinity"]["steps"] == 2
    assert sorted(path.name for path in (out / "affinity").iterdir()) == ["net", "options.json", "seeds.png"]


def test_run_again_it_is_finished_and_other_options_are_named(made):
    source, start, out = made
    before = contents(out)
    assert make(source, out, start)["images"] == 5 and contents(out) == before
    for words, named in (
        ({"reference_labels": True}, "`reference_labels` was false and is true now"),
        ({"seed": 1}, "`seed` was 0 and is 1 now"),
        ({"mask": "affinity"}, "`mask` was attention and is affinity now"),
        ({"beta": 8}, "`beta` was 16.0 and is 8.0 now"),
    ):
        with pytest.raises(DiffuMaskError, match=named):
            make(source, out, start, **words)
    with pytest.raises(DiffuMaskError, match="`backbone` was .*start and is tiny now"):
        make(source, out, "tiny")
    assert contents(out) == before


def test_masks_are_those_that_the_estimate_chooses(made):
    source, _, out = made
    net = load_affinity(out / "affinity" / "net", torch.device("cpu"))
    learning = AffinityLearning(walk=8)
    for before, after in zip(rows(source), rows(out), strict=True):
        maps, image = torch.from_numpy(before.maps)[None], torch.from_numpy(before.image)[None]
        large = torch.nn.functional.interpolate(maps.float(), (SIDE, SIDE), mode="bicubic").clamp(min=0)
        walked = affinity_maps(net, image, large / large.max(), learning.beta, learning.walk)
        estimate = torch.nn.functional.interpolate(walked, (SIDE, SIDE), mode="bilinear")
        estimate = estimate / estimate.max()
        estimate = estimate > otsu(estimate)[..., None, None]
        ids = torch.tensor([before.class_ids])
        mask, _ = make_masks(maps, image, MaskOptions(threshold="adaptive"), ids, estimate)
        assert (mask[0].numpy() == after.mask).mean() > 0.99


def test_a_larger_estimate_chooses_a_larger_mask(made):
    maps, images = rows_of_one()
    given = maps, images, MaskOptions(threshold="adaptive", refine="none"), torch.tensor([[12]])
    folder = made[2] / "affinity"
    wide, narrow = (
        AffinityMasks(folder, AffinityLearning(walk=1, affinity_threshold=cut), torch.device("cpu"))(*given)[0]
        for cut in (0.05, 0.99)
    )
    assert (wide == 12).sum() > (narrow == 12).sum() > 0


def rows_of_one() -> tuple[torch.Tensor, torch.Tensor]:
    """A map that falls from its middle outwards, and a grey image."""
    ys, xs = torch.meshgrid(torch.arange(CELLS), torch.arange(CELLS), indexing="ij")
    maps = torch.exp(-((ys - 3.5) ** 2 + (xs - 3) ** 2) / 12)[None, None]
    return maps, torch.full((1, SIDE, SIDE, 3), 90, dtype=torch.uint8)


def test_the_affinity_map_may_be_the_mask(made, tmp_path):
    source, start, out = made
    make(source, tmp_path / "out", start, mask="affinity", affinity_threshold=0.5)
    learning = AffinityLearning(mask="affinity", affinity_threshold=0.5, walk=8)
    by = AffinityMasks(tmp_path / "out" / "affinity", learning, torch.device("cpu"))
    changed = False
    for before, after, other in zip(rows(source), rows(tmp_path / "out"), rows(out), strict=True):
        maps, image = torch.from_numpy(before.maps)[None], torch.from_numpy(before.image)[None]
        ids = torch.tensor([before.class_ids])
        mask, _ = make_masks(by.maps(maps, image, ids), image, MaskOptions(threshold=0.5), ids)
        assert (mask[0].numpy() == after.mask).mean() > 0.99
        changed |= not np.array_equal(after.mask, other.mask)
    assert changed


def test_each_class_may_have_its_own_net(made, tmp_path):
    source, start, _ = made
    make(source, tmp_path / "out", start, per_class=True)
    folder = tmp_path / "out" / "affinity"
    assert sorted(path.name for path in folder.iterdir()) == ["class-12", "class-7", "options.json", "seeds.png"]
    learnt = {name: read_record(folder / name)["plan"]["images"] for name in ("class-7", "class-12")}
    assert learnt == {"class-7": [2], "class-12": [3]}
    maps, images = torch.rand(2, 2, CELLS, CELLS), torch.randint(0, 256, (2, SIDE, SIDE, 3), dtype=torch.uint8)
    ids = torch.tensor([[7, 12], [12, 7]])
    found = AffinityMasks(folder, AffinityLearning(per_class=True, walk=4), torch.device("cpu")).maps(maps, images, ids)
    alone = {}
    for number in (7, 12):
        shutil.copytree(folder / f"class-{number}", tmp_path / str(number) / "net")
        one = AffinityMasks(tmp_path / str(number), AffinityLearning(walk=4), torch.device("cpu"))
        alone[number] = one.maps(maps, images, ids)
        assert torch.allclose(found[ids == number], alone[number][ids == number], atol=1e-5)
    assert not torch.allclose(alone[7], alone[12], atol=1e-4)


def test_a_class_without_an_accepted_image_has_no_net_of_its_own(made, tmp_path):
    def dogs_rejected(sample):
        return replace(coloured(sample), accepted=sample.request.class_ids[0] == 7, reason="")

    source = dataset(tmp_path / "in", num=4, change=dogs_rejected, height=SIDE, width=SIDE)
    with pytest.raises(DiffuMaskError, match="no image of dog is accepted: leave out `per_class`"):
        make(source, tmp_path / "out", made[1], per_class=True)


# The options and the seeds' manifest have got their names, then the seeds' shards; then the net is being written.
@pytest.mark.parametrize("call", [pytest.param(3, marks=pytest.mark.slow), 10])
def test_killed_and_run_again_it_is_the_same(made, tmp_path, call):
    source, start, out = made
    kill_at(call, plain, source, start, tmp_path / "out")
    assert not (tmp_path / "out" / "preview.png").exists()
    make(source, tmp_path / "out", start)
    assert contents(tmp_path / "out") == contents(out)


def test_a_net_that_is_gone_is_trained_again(made, tmp_path):
    source, start, out = made
    shutil.copytree(out, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "affinity" / "net")
    sorted((tmp_path / "out" / "data").iterdir())[-1].unlink()
    make(source, tmp_path / "out", start)
    assert contents(tmp_path / "out") == contents(out)


def test_what_cannot_be_done_is_one_sentence(made, tmp_path):
    source, start, out = made
    with pytest.raises(DiffuMaskError, match="made by affinity: name the dataset that it was made of"):
        make(out, tmp_path / "a", start)
    augment(AugmentOptions(source, tmp_path / "more"))
    with pytest.raises(DiffuMaskError, match="more is augmented: name the dataset that it was made of"):
        make(tmp_path / "more", tmp_path / "a", start)
    with pytest.raises(DiffuMaskError, match="is an address, and nets are trained in a folder: name a folder"):
        make(source, "memory://bucket/out", start)
    with pytest.raises(DiffuMaskError, match="holds another dataset"):
        make(source, dataset(tmp_path / "b"), start)
    with pytest.raises(DiffuMaskError, match="one folder"):
        make(source, source, start)
    rejected = dataset(tmp_path / "e", change=lambda sample: replace(sample, accepted=False))
    with pytest.raises(DiffuMaskError, match="/e holds no accepted row"):
        make(rejected, tmp_path / "f", start)
    assert not (tmp_path / "f").exists()
    without = dataset(
        tmp_path / "c", change=lambda sample: replace(coloured(sample), maps=None), height=SIDE, width=SIDE
    )
    with pytest.raises(DiffuMaskError, match="stores no maps"):
        make(without, tmp_path / "d", start)
    with pytest.raises(DiffuMaskError, match="`threshold` must be one of adaptive, not 'otsu'"):
        AffinityMaskOptions(threshold="otsu")


def test_what_is_made_of_it_says_so(made, tmp_path):
    _, _, out = made
    with pytest.raises(DiffuMaskError, match="has masks by affinity: redraw a sample of the dataset"):
        rebuild(out, "dog-000000")
    remask(out, tmp_path / "otsu", MaskOptions())
    recorded = read_manifest(tmp_path / "otsu")["options"]
    assert "affinity" not in recorded and recorded["threshold"] == "otsu"


def test_affinity_as_a_command(made, tmp_path):
    source, start, _ = made
    words = [
        "affinity",
        str(source),
        str(tmp_path / "out"),
        "--backbone",
        str(start),
        "--steps",
        "1",
        "--batch-size",
        "2",
        "--walk",
        "4",
    ]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0 and "of 5 images accepted" in shown.stdout, shown.output
    made_again = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert made_again == {
        "folder": str(tmp_path / "out"),
        "images": 5,
        "accepted": made_again["accepted"],
        "advice": "",
    }
    wrong = CliRunner().invoke(app, [*words, "--affinity-threshold", "2"])
    assert wrong.exit_code == 1 and "affinity" in str(wrong.exception)


@pytest.mark.slow
def test_masks_of_the_embedded_model_are_as_good_as_without_it_or_nearly(tmp_path):
    source, out = str(tmp_path / "in"), str(tmp_path / "out")

    def call(*words: str) -> dict:
        done = CliRunner().invoke(app, [*words, "--device", "cpu", "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    call("generate", source, "--num", "12", "--seed", "8200")
    call("affinity", source, out, "--steps", "60")
    before, after = (call("evaluate", "mini-oracle", one)["foreground_iou"] for one in (source, out))
    assert before > 0.8 and after > 0.7
