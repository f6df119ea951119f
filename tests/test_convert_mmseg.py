"""convert/mmseg.py, read by the rules of MMSegmentation's BaseSegDataset and of LightlyTrain.

BaseSegDataset's rule: each file of img_path with img_suffix; in seg_map_path the same name with seg_map_suffix, one
channel, whose values are places in metainfo's classes, 255 ignored.
"""

import numpy as np
from foreign import converted, dataset, rows_by_name
from PIL import Image

NUMBER = np.arange(256, dtype=np.uint8)
NUMBER[[12, 21]] = 1, 2


def test_every_mask_by_mmsegs_rules(tmp_path):
    source = dataset(tmp_path / "a", 60)
    out, rows = converted(source, tmp_path / "b", "mmseg", val=0.2), rows_by_name(source)
    config: dict = {}
    exec((out / "dataset_config.py").read_text(), config)
    seen = []
    for name in ("train_dataset", "val_dataset"):
        part = config[name]
        assert part["type"] == "BaseSegDataset" and part["reduce_zero_label"] is False
        assert part["metainfo"]["classes"] == ("background", "dog", "traffic light")
        assert part["metainfo"]["palette"] == [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
        images, masks = (out / part["data_prefix"][kind] for kind in ("img_path", "seg_map_path"))
        found = sorted(path.name for path in images.iterdir() if path.name.endswith(part["img_suffix"]))
        assert len(found) == len(list(masks.iterdir()))
        for file_name in found:
            stem = file_name.removesuffix(part["img_suffix"])
            mask = Image.open(masks / (stem + part["seg_map_suffix"]))
            assert mask.mode == "L" and (np.array(mask) == NUMBER[rows[stem].mask]).all()
            assert (np.array(Image.open(images / file_name)) == rows[stem].image).all()
            seen.append(stem)
    assert sorted(seen) == sorted(rows) and len(seen) == 59
