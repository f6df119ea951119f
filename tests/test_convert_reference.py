"""convert/reference.py, read by the rules of the paper's program, written out, and by `import`.

Its rules: `train_image/<stem>.jpg` has its maps in `npy/<stem>.npy`, a pickled dictionary of the numbers 0 to 19 and
float32 [512, 512]; the class is the second part of the stem.
"""

import json
import re

import numpy as np
import pytest
import torch
from foreign import VOC_CLASSES, converted, dataset, rows_by_name
from PIL import Image
from torch.nn import functional as F

from diffumask_fast.convert.import_folder import import_folder
from diffumask_fast.convert.options import ConvertOptions, ImportOptions
from diffumask_fast.dataset.remask import remask
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.masks.options import MaskOptions


def test_every_image_and_map_by_that_programs_rules(tmp_path):
    source = dataset(tmp_path / "a", 60, VOC_CLASSES)
    out, rows, seen = converted(source, tmp_path / "b", "reference", image_format="jpg"), rows_by_name(source), []
    (folder,) = (path for path in out.iterdir() if path.is_dir())
    assert folder.name == "VOC_Multi_Attention_dog_sub_59_NoClipRetrieval_sample"
    lines = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    for line in lines:
        row, stem = rows[line["key"]], line["image"]
        assert re.fullmatch(r"image_dog_\d+", stem) and stem.split("_")[1] == line["class"]
        assert (line["prompt"], line["seed"]) == (row.prompt, row.seed)
        image = Image.open(folder / "train_image" / f"{stem}.jpg")
        whole = Image.fromarray(row.image).resize((512, 512), Image.Resampling.BICUBIC)
        assert image.size == (512, 512) and np.abs(np.array(image, int) - np.array(whole, int)).mean() < 3
        maps = np.load(folder / "npy" / f"{stem}.npy", allow_pickle=True).item()
        assert list(maps) == list(range(20)) and {(m.dtype.str, m.shape) for m in maps.values()} == {
            ("<f4", (512, 512))
        }
        for place, class_id in enumerate(VOC_CLASSES):
            large = F.interpolate(
                torch.from_numpy(row.maps[place, None, None].astype(np.float32)), (512, 512), mode="bicubic"
            )[0, 0]
            assert np.abs(maps[class_id - 1] - (large / large.max()).numpy()).max() < 1e-6
        assert not any(maps[index].any() for index in range(20) if index + 1 not in VOC_CLASSES)
        seen.append(row.key)
    assert sorted(seen) == sorted(rows) and len(list(folder.glob("*/*"))) == 2 * 59


def test_imported_again_it_gives_the_masks_of_its_maps(tmp_path):
    source = dataset(tmp_path / "a", 4, VOC_CLASSES)
    out = converted(source, tmp_path / "b", "reference", image_format="jpg")
    assert import_folder(ImportOptions(out, tmp_path / "c", "reference"))["images"] == 4
    remask(source, tmp_path / "d", MaskOptions(refine="none"))
    remask(tmp_path / "c", tmp_path / "e", MaskOptions(refine="none"))
    masks = {row.seed: row.mask for row in rows_by_name(tmp_path / "d").values()}
    shares = []
    for row in rows_by_name(tmp_path / "e").values():
        small = masks[row.seed]
        height, width = small.shape
        centres = np.ix_((np.arange(height) * 512 + 256) // height, (np.arange(width) * 512 + 256) // width)
        shares.append((row.mask[centres] == small).mean())
    assert len(shares) == 4 and np.mean(shares) > 0.95


def test_what_it_does_not_hold_is_refused(tmp_path):
    own = dataset(tmp_path / "a")
    with pytest.raises(DiffuMaskError, match="traffic light is none of VOC's classes"):
        converted(own, tmp_path / "b", "reference", image_format="jpg")
    assert not any((tmp_path / "b").iterdir())
    for change in ({"val": 0.1}, {"image_format": "png"}):
        with pytest.raises(DiffuMaskError, match="JPEG images and no splits"):
            ConvertOptions(own, tmp_path / "b", "reference", **change)
    voc = converted(dataset(tmp_path / "c", 12, VOC_CLASSES), tmp_path / "d", "voc")
    import_folder(ImportOptions(voc, tmp_path / "e", "voc"))
    with pytest.raises(DiffuMaskError, match="shard-00000.parquet: .* has no maps, and this format holds maps"):
        converted(tmp_path / "e", tmp_path / "f", "reference", image_format="jpg")
