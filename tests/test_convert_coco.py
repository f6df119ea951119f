"""convert/coco.py, read by pycocotools."""

import contextlib
import io

import numpy as np
import pytest
from foreign import converted, dataset, rows_by_name
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def opened(path):
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(path)


def test_every_mask_by_pycocotools(tmp_path):
    source = dataset(tmp_path / "a", 60)
    out, rows = converted(source, tmp_path / "b", "coco", val=0.2), rows_by_name(source)
    seen = []
    for split in ("train", "val"):
        coco = opened(out / "annotations" / f"instances_{split}.json")
        assert [(one["id"], one["name"]) for one in coco.loadCats(coco.getCatIds())] == [
            (12, "dog"),
            (21, "traffic light"),
        ]
        for image in coco.loadImgs(coco.getImgIds()):
            stem = image["file_name"].removesuffix(".png")
            row, ignored = rows[stem], rows[stem].mask == 255
            assert (image["height"], image["width"]) == row.mask.shape and image["prompt"] == row.prompt
            assert (np.array(Image.open(out / "images" / split / image["file_name"])) == row.image).all()
            found = coco.loadAnns(coco.getAnnIds(image["id"]))
            assert [(one["category_id"], one["iscrowd"]) for one in found] == [(12, 0), (21, 0), (12, 1), (21, 1)]
            for one in found:
                pixels, truth = coco.annToMask(one) > 0, ignored if one["iscrowd"] else row.mask == one["category_id"]
                assert (pixels == truth).all() and one["area"] == truth.sum()
                y, x = np.nonzero(truth)
                assert one["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
            seen.append(stem)
    assert sorted(seen) == sorted(rows) and len(seen) == 59


def test_its_own_masks_score_full_marks_and_ignored_pixels_cost_nothing(tmp_path):
    out = converted(dataset(tmp_path / "a"), tmp_path / "b", "coco")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(out / "annotations" / "instances_train.json")
        fields = ("image_id", "category_id", "segmentation")
        found = [{name: one[name] for name in fields} | {"score": 1.0} for one in truth.anns.values()]
        judge = COCOeval(truth, truth.loadRes(found), "segm")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    assert judge.stats[0] == 1


def test_ids_are_unique_over_shards(tmp_path):
    coco = opened(converted(dataset(tmp_path / "a"), tmp_path / "b", "coco") / "annotations" / "instances_train.json")
    assert len(coco.imgs) == 11 and len(coco.anns) == 44 == len(coco.dataset["annotations"])
