"""bench/protocol_tables.py: the figures are the rows', and the paper's are beside them."""

import pytest
from PIL import Image

from diffumask_fast.bench.protocol import CELLS, SUITE
from diffumask_fast.bench.protocol_tables import (
    ABLATIONS,
    HEADLINE,
    NONE_YET,
    ZERO_SHOT,
    all_tables,
    by_cell,
    plot,
)
from diffumask_fast.bench.rows import row

SCALE = {"images": 360, "tests": 400, "steps": 1000, "finetune_steps": 250, "ablation_steps": 500, "fold_steps": 300}


def made(name, seed, dog, cat, masks_iou=None, images=360, commit="abc"):
    test = {
        "miou": (dog + cat) / 2, "per_class_iou": {"dog": dog, "cat": cat},
        "seen_miou": dog, "unseen_miou": cat, "harmonic_mean": 2 * dog * cat / (dog + cat),
    }  # fmt: skip
    config = {
        "seed": seed, "scale": SCALE, "images": images, "masks_iou": masks_iou, "dtype": "bf16", "threads": 1,
        "tests": {"kept": test, "held-out": {**test, "miou": test["miou"] / 2}}, "cpu": "some processor",
        "torch": "2.13.0", "commit": commit,
    }  # fmt: skip
    return row(SUITE, name, test["miou"], unit="mIoU", config=config)


ROWS = [
    made("headline/real", 0, 0.5, 0.7), made("headline/real", 1, 0.5, 0.6),
    made("headline/synthetic", 0, 0.6, 0.4, 0.9), made("headline/synthetic", 1, 0.5, 0.5, 0.92),
    made("headline/synthetic-then-fifth", 0, 0.8, 0.6, images=72),
    made("headline/oracle-masks", 0, 0.6, 0.5),
    made("default", 0, 0.4, 0.4, 0.9), made("default", 1, 0.3, 0.5, 0.92),
    made("pruning/0.3", 1, 0.3, 0.3, 0.95, images=252),
    made("zero-shot/real", 0, 0.5, 0.1),
]  # fmt: skip


def lines(rows):
    return all_tables(rows).splitlines()


def test_the_headline_has_means_and_ends_and_the_papers_figures():
    table = lines(ROWS)
    assert "| real scenes | 360 | 57.5 (55.0 to 60.0) | 28.8 (27.5 to 30.0) | 11.5k: 77.3, 84.3 |" in table
    assert "| synthetic images | 360 | 50.0 (50.0 to 50.0) | 25.0 (25.0 to 25.0) | 60k: 57.4, 70.6 |" in table
    assert "| a fifth of them | – | – | – | 5.0k: –, 83.4 |" in table


def test_what_is_found_compares_seeds_with_themselves():
    found = [line for line in lines(ROWS) if line.startswith("- ")]
    assert found == [
        "- Synthetic over real: -7.5 (-10.0 to -5.0) points of mIoU.",
        "- Best class: dog, +5.0; worst: cat, -20.0.",
        "- Synthetic, then a fifth of the real, over all the real: +10.0.",
        "- Of the gap to real, the masks are +5.0 (the oracle's masks over ours, same images), the images +5.0 (real "
        "over synthetic images with the oracle's masks).",
    ]


def test_classes_stand_beside_the_papers():
    table = lines(ROWS)
    assert "| dog | 50.0 | 55.0 | 80.0 | +5.0 (+0.0 to +10.0) | 96.8 | 86.0 | 95.5 |" in table
    assert lines(ROWS[:2] + ROWS[6:]) and not any(line.startswith("| dog |") for line in lines(ROWS[:4]))


def test_ablations_are_over_the_default_of_the_same_seed():
    table = lines(ROWS)
    assert "| alpha 0.3 | 252 | 95.0 | 30.0 | -10.0 | 83.2 |" in table
    assert "| nothing is pruned (default) | 360 | 91.0 (90.0 to 92.0) | 40.0 (40.0 to 40.0) | – | – |" in table
    assert not any(line.startswith(("| masks |", "| augmentation |")) for line in table)


def test_zero_shot_has_seen_unseen_and_their_mean():
    assert "| real scenes without the five | 50.0 | 10.0 | 16.7 | – |" in lines(ROWS)
    assert not any(line.startswith("| zero-shot") for line in lines(ROWS[:-1]))


def test_the_last_line_says_how_it_was_made():
    said = lines([*ROWS, made("headline/fifth", 0, 0.1, 0.1, commit="def")])[-1]
    assert said.startswith("11 segmenters, 2 seeds; mean (lowest to highest). 360 images, 400 scenes in a test; 1000")
    assert "300 in each fold; bf16." in said and said.endswith("1 thread, torch 2.13.0, commit abc, def.")


def test_of_two_rows_of_a_seed_the_last_counts():
    rows = [made("headline/real", 0, 0.1, 0.1), made("headline/real", 0, 0.5, 0.7)]
    assert by_cell(rows)["headline/real"] == {0: rows[1]}


def test_no_rows():
    assert all_tables([]) == NONE_YET


def test_a_class_that_no_test_image_holds_has_no_figure():
    rows = [made(f"headline/{name}", 0, 0.5, 0.7) for name in ("real", "synthetic", "synthetic-then-fifth")]
    for one in rows:
        one["config"]["tests"]["kept"]["per_class_iou"]["cow"] = None
    assert "Best class: dog, +0.0; worst: dog, +0.0" in all_tables(rows)
    assert "| cow | – | – | – | – | 95.9 | 92.2 | 96.7 |" in lines(rows)


def test_every_cell_is_in_a_table():
    shown = {*HEADLINE, *ZERO_SHOT, *(name for names in ABLATIONS.values() for name in names)}
    assert shown == {cell.name for cell in CELLS}


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]])
def test_the_plot_carries_the_rows_digest(rows, tmp_path):
    plot(rows, tmp_path / "plot.png", "1234")
    with Image.open(tmp_path / "plot.png") as image:
        assert image.text["rows"] == "1234" and image.width > 500
        assert len(image.convert("RGB").getcolors(1 << 20)) > 5
