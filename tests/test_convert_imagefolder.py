"""convert/imagefolder.py, read by Hugging Face's datasets."""

import datasets
import numpy as np
from foreign import converted, dataset, rows_by_name

NUMBER = np.arange(256, dtype=np.uint8)
NUMBER[[12, 21]] = 1, 2


def test_every_mask_by_datasets(tmp_path):
    source = dataset(tmp_path / "a", 60)
    out, rows = converted(source, tmp_path / "b", "imagefolder", val=0.2), rows_by_name(source)
    loaded = datasets.load_dataset("imagefolder", data_dir=str(out), cache_dir=str(tmp_path / "cache"))
    assert set(loaded) == {"train", "validation"}
    seen = []
    for split in loaded.values():
        assert {"image", "mask", "prompt", "seed", "classes", "class_numbers", "quality"} <= set(split.column_names)
        for sample in split:
            row = rows[sample["key"]]
            assert (np.array(sample["image"]) == row.image).all()
            assert (np.array(sample["mask"]) == NUMBER[row.mask]).all()
            assert (sample["prompt"], sample["seed"], sample["classes"]) == (row.prompt, row.seed, row.classes)
            seen.append(sample["key"])
    assert sorted(seen) == sorted(rows) and len(seen) == 59
