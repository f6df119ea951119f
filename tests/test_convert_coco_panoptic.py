"""convert/coco_panoptic.py, read by the rules of panopticapi, written out: ids are R + 256 G + 65536 B; each id in the
picture has a segment and each segment pixels; its area is their number; id 0 is void."""

import json

import numpy as np
from foreign import converted, dataset, rows_by_name
from PIL import Image


def test_every_mask_by_panopticapis_rules(tmp_path):
    source = dataset(tmp_path / "a", 60)
    out, rows = converted(source, tmp_path / "b", "coco-panoptic", val=0.2), rows_by_name(source)
    seen = []
    for split in ("train", "val"):
        content = json.loads((out / "annotations" / f"panoptic_{split}.json").read_text())
        names = {one["id"]: one["name"] for one in content["categories"]}
        assert names == {12: "dog", 21: "traffic light", 22: "background"}
        assert not any(one["isthing"] for one in content["categories"])
        images = {one["id"]: one for one in content["images"]}
        assert len(images) == len(content["images"]) == len(content["annotations"])
        for annotation in content["annotations"]:
            image = images[annotation["image_id"]]
            stem = image["file_name"].removesuffix(".png")
            row = rows[stem]
            picture = Image.open(out / "annotations" / f"panoptic_{split}" / annotation["file_name"])
            assert picture.mode == "RGB" and annotation["file_name"] == f"{stem}.png"
            ids = np.array(picture, np.uint32) @ np.array([1, 256, 65536], np.uint32)
            segments = {one["id"]: one for one in annotation["segments_info"]}
            assert set(np.unique(ids).tolist()) - {0} == set(segments) and ids.shape == (
                image["height"],
                image["width"],
            )
            mask = np.full(ids.shape, 255)
            for number, segment in segments.items():
                assert segment["area"] == (ids == number).sum() and segment["iscrowd"] == 0
                mask[ids == number] = segment["category_id"] % 22
            assert (mask == row.mask).all()
            seen.append(stem)
    assert sorted(seen) == sorted(rows) and len(seen) == 59
