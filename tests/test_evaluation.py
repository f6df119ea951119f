"""learning/evaluation.py: the figures are what they say."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from samples import draw, requests
from typer.testing import CliRunner

from diffumask_fast.cli import app
from diffumask_fast.dataset.run import open_run
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.evaluation import Metrics, best_threshold_iou, evaluate
from diffumask_fast.learning.metrics import binary_iou, boundary, official_width
from diffumask_fast.learning.options import EvaluateOptions
from diffumask_fast.masks.make import refine_maps
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.mini.world import HOME, VOC, World, load_sprites, write_world

DOG, CAT = VOC["dog"].id, VOC["cat"].id
IDS = {name: VOC[name].id for name in HOME}
PLAIN = MaskOptions(refine="none")


def row(mask, *classes, maps=None, image=None):
    image = np.zeros((*mask.shape, 3), np.uint8) if image is None else image
    ids = [VOC[name].id for name in classes if name in VOC]
    return SimpleNamespace(
        key="+".join(classes), classes=classes, class_ids=ids, mask=mask, maps=maps, image=image
    )  # fmt: skip


def square(value, top, left, side, size=20):
    mask = np.zeros((size, size), np.uint8)
    mask[top : top + side, left : left + side] = value
    return mask


def test_ious_are_counted_by_hand():
    metrics = Metrics()
    metrics.update(row(square(DOG, 0, 0, 10), "dog"), square(DOG, 0, 5, 10), IDS, PLAIN)  # 50 common, 150 in all
    metrics.update(row(square(DOG, 0, 0, 10), "dog"), square(CAT, 0, 0, 10), IDS, PLAIN)  # another class: 0 of 100
    metrics.update(row(square(CAT, 0, 0, 10), "cat"), square(CAT, 0, 0, 10), IDS, PLAIN)
    figures = metrics.compute()
    assert figures["n"] == 3
    assert figures["per_class_iou"] == pytest.approx({"dog": 50 / 250, "cat": 100 / 200})
    assert figures["miou"] == pytest.approx((0.2 + 0.5) / 2)
    assert figures["foreground_iou"] == pytest.approx((1 / 3 + 1 + 1) / 3)
    assert figures["class_agreement"] == pytest.approx(2 / 3)
    assert figures["per_class_agreement"] == {"cat": 1.0, "dog": 0.5}
    assert figures["best_threshold_iou"] is None


def test_a_dataset_may_have_ids_of_its_own():
    ours, own = Metrics(), Metrics()
    for value, metrics in ((DOG, ours), (1, own)):
        judged = row(square(value, 0, 0, 10), "dog")
        judged.class_ids = [value]
        metrics.update(judged, square(DOG, 0, 5, 10), IDS, PLAIN)
    assert own.compute() == ours.compute() and own.compute()["miou"] == pytest.approx(50 / 150)


def test_what_is_ignored_is_left_out_or_background():
    mask = square(DOG, 0, 0, 10)
    mask[:, 5:] = 255  # half of the dog, and half of the image and more
    truths = square(DOG, 0, 0, 10), square(DOG, 0, 0, 10) | square(DOG, 0, 2, 5)
    for is_background, ious in ((False, [1.0, 1.0]), (True, [0.5, 0.5])):
        metrics = Metrics(is_background)
        for truth in truths:
            metrics.update(row(mask, "dog"), truth, IDS, PLAIN)
        assert metrics.foreground == ious and metrics.compute()["ignored_share"] == 0.75
        assert metrics.compute()["miou"] == pytest.approx(ious[0])


def test_figures_do_not_depend_on_what_is_ignored():
    rng = np.random.default_rng(0)
    truth, mask = square(DOG, 2, 3, 12, 40), square(DOG, 4, 1, 12, 40)
    band = rng.random(mask.shape) < 0.2
    figures = []
    for value in (0, DOG, CAT):  # the truth at pixels that are left out
        metrics = Metrics()
        metrics.update(row(np.where(band, 255, mask), "dog"), np.where(band, value, truth).astype("u1"), IDS, PLAIN)
        figures.append({name: metrics.compute()[name] for name in ("miou", "foreground_iou", "per_class_iou")})
    assert figures[0] == figures[1] == figures[2]
    kept = ~band
    assert figures[0]["foreground_iou"] == binary_iou((mask > 0)[kept], (truth > 0)[kept])


def test_nothing_seen_is_no_agreement():
    metrics = Metrics()
    for truth in (square(DOG, 0, 0, 10), np.zeros((20, 20), np.uint8)):
        metrics.update(row(square(DOG, 0, 0, 10), "dog"), truth, IDS, PLAIN)
    assert metrics.agreed == {"dog": [True, False]}


def by_erosion(mask, ratio=0.02):
    """Boundary IoU as its authors' program has it: the mask less what is left of it after so many erosions."""
    steps = max(1, round(ratio * math.hypot(*mask.shape)))
    left = np.pad(mask, 1)
    for _ in range(steps):
        shifts = [np.roll(left, (y, x), (0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1)]
        left = np.logical_and.reduce(shifts)
    return mask & ~left[1:-1, 1:-1]


@pytest.mark.parametrize("shape", [(128, 128), (96, 200), (33, 7)])
def test_the_official_boundary(shape):
    rng = np.random.default_rng(1)
    made, true = (rng.random((8, 8)).repeat(25, 0).repeat(25, 1)[: shape[0], : shape[1]] > 0.4 for _ in range(2))
    assert made.shape == shape
    for mask in (made, true):
        assert np.array_equal(boundary(mask, official_width(shape)), by_erosion(mask))
    metrics = Metrics()
    metrics.update(row(made * np.uint8(DOG), "dog"), true * np.uint8(DOG), IDS, PLAIN)
    figures = metrics.compute()
    assert figures["boundary_iou_ratio_0.02"] == pytest.approx(binary_iou(by_erosion(made), by_erosion(true)))
    assert figures["boundary_iou"] == figures["boundary_iou_3px_at_128"] == binary_iou(boundary(made), boundary(true))


def test_two_classes_are_seen_where_both_see_both():
    both = square(DOG, 0, 0, 10) + square(CAT, 10, 10, 10)
    speck = square(DOG, 0, 0, 10) + square(CAT, 10, 10, 1)  # 1 of 400 pixels
    metrics = Metrics()
    for mask, truth in ((both, both), (both, speck), (speck, both), (square(DOG, 0, 0, 10), both)):
        metrics.update(row(mask, "dog", "cat"), truth, IDS, PLAIN)
    assert metrics.seen == [True, False, False, False]
    assert not metrics.agreed


def test_the_boundary_is_three_pixels_at_128_and_grows_with_the_side():
    for size, distance in ((128, 3), (256, 6), (20, 1)):
        mask = square(1, 0, 0, size, size) > 0  # all of it: the image's border is its boundary
        inner = np.zeros_like(mask)
        inner[distance:-distance, distance:-distance] = True
        assert np.array_equal(boundary(mask), ~inner)
    assert binary_iou(np.zeros((4, 4), bool), np.zeros((4, 4), bool)) == 1


def test_the_best_threshold_is_the_best_of_all():
    rng = np.random.default_rng(0)
    truth = square(1, 4, 4, 20, 32) > 0
    maps = np.clip(rng.normal(90, 40, (1, 8, 8)) + 90 * truth[::4, ::4], 0, 255).astype(np.uint8)
    image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    found = best_threshold_iou(row(truth, "dog", maps=maps, image=image), truth, MaskOptions())
    refined = refine_maps(torch.from_numpy(maps)[None].float(), torch.from_numpy(image)[None], MaskOptions())[0, 0]
    assert found == pytest.approx(max(binary_iou(refined.numpy() > t, truth) for t in np.arange(0.02, 1, 0.02)))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes")
    write_world(out, num=40, seed=31)
    return out


def test_exact_masks_of_the_world_are_found_good(scenes):
    figures = evaluate(EvaluateOptions("mini-oracle", scenes))
    assert figures["n"] == 40 and figures["best_threshold_iou"] is None
    assert figures["foreground_iou"] > 0.9 and figures["miou"] > 0.85 and figures["boundary_iou"] > 0.7
    assert figures["class_agreement"] > 0.95


def test_shuffled_masks_are_found_bad(scenes, tmp_path):
    world = World(load_sprites())
    drawn = [world.scene(31, index) for index in range(8)]
    wanted = requests(8)
    with open_run(tmp_path, wanted, {}, {}, 8) as run:
        samples = [draw(request) for request in wanted]
        for sample, scene, other in zip(samples, drawn, drawn[1:] + drawn[:1], strict=True):
            sample.image, sample.mask = scene.image, other.mask
        run.write(0, samples)
    assert evaluate(EvaluateOptions("mini-oracle", tmp_path))["foreground_iou"] < 0.6


def test_the_command(scenes, tmp_path):
    sheet = tmp_path / "worst.png"
    done = CliRunner().invoke(app, ["evaluate", "mini-oracle", str(scenes), "--json", "--sheet", str(sheet)])
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    fixed = {"n", "miou", "per_class_iou", "foreground_iou", "boundary_iou", "class_agreement"}
    assert fixed <= set(figures) and set(figures["per_class_iou"]) == set(HOME)
    width, height = Image.open(sheet).size
    assert width > 3 * 4 * 128 and height > 7 * 128  # twenty of 40, three in a row
    table = CliRunner().invoke(app, ["evaluate", "mini-oracle", str(scenes)])
    assert table.exit_code == 0 and "pottedplant" in table.stdout and "class_agreement" in table.stdout
    assert "boundary_iou_3px_at_128 " in table.stdout and "boundary_iou_ratio_0.02 " in table.stdout
    line = next(line for line in table.stdout.splitlines() if line.startswith("best_threshold_iou"))
    assert line.endswith("(the maps alone, each image's cut at its own best threshold; masks may be better)")
    assert "boundary_iou " not in table.stdout and "255" not in table.stdout


def test_a_sheet_is_written_over_our_own_alone(scenes, tmp_path):
    sheet = tmp_path / "worst.png"
    for _ in range(2):
        evaluate(EvaluateOptions("mini-oracle", scenes, sheet=sheet))
    with Image.open(sheet) as picture:
        Image.fromarray(np.asarray(picture)).save(tmp_path / "theirs.png")
    (tmp_path / "link.png").symlink_to(sheet)
    for theirs in (tmp_path / "theirs.png", scenes / "dataset.json", tmp_path / "link.png", tmp_path):
        before = theirs.read_bytes() if theirs.is_file() else None
        with pytest.raises(DiffuMaskError, match=f"{theirs.name} is there and was not written by this program"):
            evaluate(EvaluateOptions("mini-oracle", scenes, sheet=theirs))
        assert before is None or theirs.read_bytes() == before


def test_what_cannot_be_judged_is_one_sentence(tmp_path):
    with pytest.raises(DiffuMaskError, match="other is no segmenter"):
        evaluate(EvaluateOptions("other", tmp_path))
    with pytest.raises(DiffuMaskError, match="generate"):
        evaluate(EvaluateOptions("mini-oracle", tmp_path))
    wanted = requests(2, "dog,bicycle")
    with open_run(tmp_path / "a", wanted, {}, {}, 8) as run:
        run.write(0, [draw(request) for request in wanted])
    with pytest.raises(DiffuMaskError, match="bicycle"):
        evaluate(EvaluateOptions("mini-oracle", tmp_path / "a"))
    wanted = requests(1)
    with open_run(tmp_path / "b", wanted, {}, {}, 8) as run:
        rejected = draw(wanted[0])
        rejected.accepted, rejected.reason = False, "too small"
        run.write(0, [rejected])
    assert evaluate(EvaluateOptions("mini-oracle", tmp_path / "b"))["n"] == 1
    with pytest.raises(DiffuMaskError, match="no row to judge"):
        evaluate(EvaluateOptions("mini-oracle", tmp_path / "b", accepted=True))
    (tmp_path / "b" / "data" / "shard-00000.parquet").write_bytes(b"half a shard")
    with pytest.raises(DiffuMaskError, match="cannot be read"):
        evaluate(EvaluateOptions("mini-oracle", tmp_path / "b"))
