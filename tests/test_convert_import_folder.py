"""convert/import_folder.py: out and in again, masks are equal; a run of its own kind."""

import json

import numpy as np
import pytest
from foreign import converted, dataset, drawn, killed_import, rows_by_name
from killed import kill_at
from PIL import Image
from samples import contents

from diffumask_fast.convert.import_folder import import_folder
from diffumask_fast.convert.options import ImportOptions
from diffumask_fast.dataset.origin import is_drawn
from diffumask_fast.errors import DiffuMaskError


def imported(source, out, layout, **options):
    import_folder(ImportOptions(source, out, layout, **options))
    return out


def written(folder):
    return {name: data for name, data in contents(folder).items() if name != "convert.json"}


@pytest.mark.parametrize("layout", ["voc", "coco"])
def test_out_in_and_out_again_the_files_are_the_same(tmp_path, layout):
    source = dataset(tmp_path / "a", 60)
    first = converted(source, tmp_path / "b", layout)
    back = imported(first, tmp_path / "c", layout)
    second = converted(back, tmp_path / "d", layout)
    assert written(first) == written(second)
    ours, theirs = rows_by_name(source), rows_by_name(back)
    assert list(ours) == list(theirs) and len(ours) == 59
    number = np.arange(256, dtype=np.uint8)
    if layout == "voc":
        number[[12, 21]] = 1, 2
    for key, row in theirs.items():
        assert (row.mask == number[ours[key].mask]).all() and (row.image == ours[key].image).all()
        assert is_drawn(row.values["image"]["bytes"])
        assert row.classes == ["dog", "traffic light"] and row.quality == [1, 1] and row.accepted


@pytest.mark.parametrize(
    ("layout", "image_format"), [("voc", "jpg"), ("voc", "png"), ("coco", "jpg"), ("coco", "png"), ("coco", "webp")]
)
def test_only_drawn_images_are_marked_so(tmp_path, layout, image_format):
    """A person's photograph among them stays one; the mark is read from any format."""
    out = converted(dataset(tmp_path / "a", 3), tmp_path / "b", layout, image_format=image_format)
    photograph = min(out.rglob(f"*-000001.{image_format}"))  # the mask may have the same name
    Image.fromarray(np.array(Image.open(photograph))).save(photograph)
    rows = rows_by_name(imported(out, tmp_path / "c", layout))
    assert [is_drawn(row.values["image"]["bytes"]) for row in rows.values()] == [True, False, True]


def test_manifest_and_summary(tmp_path):
    source = converted(dataset(tmp_path / "a"), tmp_path / "b", "voc")
    summary = import_folder(ImportOptions(source, tmp_path / "c", "voc", shard_size=4))
    assert summary == {"folder": str(tmp_path / "c"), "images": 11, "accepted": 11, "left_out": 0}
    manifest = json.loads((tmp_path / "c" / "dataset.json").read_text())
    assert manifest["options"] == {"import": "voc", "split": None, "shard_size": 4}
    assert [entry["name"] for entry in manifest["classes"]] == ["dog", "traffic light"]
    names = [f"data/shard-0000{index}.parquet" for index in range(3)]
    assert list(contents(tmp_path / "c")) == ["README.md", *names, "dataset.json", "preview.png"]


def test_killed_it_ends_with_the_same_bytes(tmp_path):
    source = converted(dataset(tmp_path / "a"), tmp_path / "b", "voc")
    whole = contents(imported(source, tmp_path / "whole", "voc", shard_size=4))
    for call in (1, 3):
        kill_at(call, killed_import, source, tmp_path / "c")
    assert contents(imported(source, tmp_path / "c", "voc", shard_size=4)) == whole


def test_images_without_a_class_are_left_out_and_counted(tmp_path):
    source = converted(dataset(tmp_path / "a"), tmp_path / "b", "voc")
    names = sorted(path for path in (source / "SegmentationClass").iterdir())
    for path in names[:2]:
        mask = Image.open(path)
        empty = Image.fromarray(np.where(np.array(mask) == 255, 255, 0).astype(np.uint8), "P")
        empty.putpalette(mask.getpalette("RGB"))
        empty.save(path)
    summary = import_folder(ImportOptions(source, tmp_path / "c", "voc"))
    assert (summary["images"], summary["left_out"]) == (9, 2)
    for path in names[1:]:
        path.write_bytes(names[0].read_bytes())
    for path in (source / "JPEGImages").iterdir():
        Image.fromarray(drawn(0).image).save(path)
    with pytest.raises(DiffuMaskError, match="no image in .* has a class in its mask"):
        import_folder(ImportOptions(source, tmp_path / "d", "voc"))


def test_names_that_are_no_keys_become_keys(tmp_path):
    source = converted(dataset(tmp_path / "a"), tmp_path / "b", "coco")
    path = source / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    for image, name in zip(content["images"], ("my dog.png", "sub/x.png", "x.png"), strict=False):
        (source / "images" / "train" / "sub").mkdir(exist_ok=True)
        (source / "images" / "train" / image["file_name"]).rename(source / "images" / "train" / name)
        image["file_name"] = name
    path.write_text(json.dumps(content))
    keys = list(rows_by_name(imported(source, tmp_path / "c", "coco")))
    assert keys[:4] == ["my-dog-000000", "x", "x-000002", "dog+traffic-light-000003"]


def test_another_layout_or_split_in_the_same_folder(tmp_path):
    source = converted(dataset(tmp_path / "a"), tmp_path / "b", "voc", val=0.3)
    imported(source, tmp_path / "c", "voc", split="val")
    with pytest.raises(DiffuMaskError, match="`split` was val and is train now"):
        imported(source, tmp_path / "c", "voc", split="train")
    with pytest.raises(DiffuMaskError, match="`layout` must be one of voc, coco, reference, not 'ade20k'"):
        imported(source, tmp_path / "d", "ade20k")
    with pytest.raises(DiffuMaskError, match="one folder, or one lies in the other"):
        imported(source, source, "voc")
