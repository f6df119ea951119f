"""convert/voc.py, read by the rules of torchvision's VOCSegmentation and of CVAT's mask format, and by our own reader.

torchvision's rule: the names in ImageSets/Segmentation/<set>.txt; JPEGImages/<name>.jpg; SegmentationClass/<name>.png
as PIL opens it, whose values are the classes.
"""

import numpy as np
import pytest
from foreign import converted, dataset, rows_by_name
from PIL import Image

from diffumask_fast.learning.data import open_data
from diffumask_fast.prompts.vocabulary import Vocabulary, voc_palette

NUMBER = np.arange(256, dtype=np.uint8)
NUMBER[[12, 21]] = 1, 2  # the numbers that files have for the classes


def test_every_mask_by_torchvisions_rules(tmp_path):
    source = dataset(tmp_path / "a", 60)
    out, rows = converted(source, tmp_path / "b", "voc", image_format="jpg"), rows_by_name(source)
    names = (out / "ImageSets" / "Segmentation" / "train.txt").read_text().splitlines()
    assert names == list(rows) and len(names) == 59
    for name in names:
        image, mask = (
            Image.open(out / "JPEGImages" / f"{name}.jpg"),
            Image.open(out / "SegmentationClass" / f"{name}.png"),
        )
        assert (np.array(mask) == NUMBER[rows[name].mask]).all()
        assert (mask.mode, mask.getpalette("RGB")) == ("P", voc_palette())
        assert (
            np.abs(np.array(image).astype(int) - rows[name].image).mean() < 8
        )  # noise is the worst that JPEG can meet
    assert {path.stem for path in (out / "JPEGImages").iterdir()} == set(names)


def test_every_mask_by_cvats_rules(tmp_path):
    """CVAT reads colours, and labelmap.txt says what they mean."""
    source = dataset(tmp_path / "a")
    out, rows = converted(source, tmp_path / "b", "voc"), rows_by_name(source)
    lines = [line.split(":") for line in (out / "labelmap.txt").read_text().splitlines() if line[0] != "#"]
    colours = {tuple(map(int, line[1].split(","))): line[0] for line in lines}
    names = {0: "background", 12: "dog", 21: "traffic light", 255: "ignored"}
    assert list(colours.values()) == list(names.values()) and all(len(line) == 4 for line in lines)
    for name, row in rows.items():
        shown = np.array(Image.open(out / "SegmentationClass" / f"{name}.png").convert("RGB"))
        for colour, label in colours.items():
            known = {number for number, other in names.items() if other == label}
            assert ((shown == colour).all(-1) == np.isin(row.mask, list(known))).all()


@pytest.mark.parametrize("image_format", ["jpg", "png"])
def test_our_own_reader_takes_it(tmp_path, image_format):
    source = dataset(tmp_path / "a", 9)
    data = open_data(converted(source, tmp_path / "b", "voc", image_format=image_format), split="train")
    assert data.classes == {0: "background", 1: "dog", 2: "traffic light"} and len(data) == 8
    rows = rows_by_name(source)
    assert all((example.labels == NUMBER[rows[example.name].mask]).all() for example in data)


def test_vocs_own_classes_keep_vocs_numbers(tmp_path):
    source = dataset(tmp_path / "a", 6, {12: "dog", 7: "car"})
    data = open_data(converted(source, tmp_path / "b", "voc"), split="train")
    assert list(data.classes.values()) == ["background", *Vocabulary.voc().names]
    rows = rows_by_name(source)
    assert all((example.labels == rows[example.name].mask).all() for example in data)


def test_lists_of_a_split(tmp_path):
    out = converted(dataset(tmp_path / "a"), tmp_path / "b", "voc", val=0.3)
    train, val, both = (
        (out / "ImageSets" / "Segmentation" / f"{name}.txt").read_text().splitlines()
        for name in ("train", "val", "trainval")
    )
    assert len(val) == 3 and not set(train) & set(val) and sorted(both) == sorted(train + val)
