"""convert/yolo.py, read by the rules of Ultralytics, written out, and, where it is installed, by Ultralytics itself.

Its rules: a label file has a line for each object, class and then x and y as shares of the image; they are multiplied
by the image's size, cut to whole numbers and filled by cv2.fillPoly. A mask has the image's stem, in `masks_dir` in
place of `images`; its values are places in `names`, 255 ignored.
"""

import numpy as np
import pytest
import torch
import yaml
from foreign import converted, dataset, fill, rows_by_name
from PIL import Image

NUMBER = np.arange(256, dtype=np.uint8)
NUMBER[[12, 21]] = 1, 2
LABELS = {0: 12, 1: 21}


def places(out, name):
    """Yield stem, split and image of all images that a description names."""
    described = yaml.safe_load((out / name).read_text())
    assert "path" not in described  # then the folder of the file is meant, wherever it is moved to
    for split in ("train", "val"):
        for path in sorted((out / described[split]).iterdir()):
            yield path.stem, split, path


def test_every_polygon_by_ultralytics_rules(tmp_path):
    source = dataset(tmp_path / "a", 60)
    out, rows = converted(source, tmp_path / "b", "yolo", val=0.2), rows_by_name(source)
    described = yaml.safe_load((out / "data.yaml").read_text())
    assert described["names"] == {0: "dog", 1: "traffic light"} and "masks_dir" not in described
    seen = []
    for stem, split, image in places(out, "data.yaml"):
        row = rows[stem]
        assert (np.array(Image.open(image)) == row.image).all()
        height, width = row.mask.shape
        filled = {class_id: np.zeros((height, width), int) for class_id in LABELS.values()}
        for line in (out / "labels" / split / f"{stem}.txt").read_text().splitlines():
            number, *shares = line.split(" ")
            assert len(shares) >= 6 and all(0 <= float(share) <= 1 for share in shares)
            points = (np.array(shares, np.float32).reshape(-1, 2) * (width, height)).astype(np.int32)
            filled[LABELS[int(number)]] += fill(points, height, width)
        for class_id, pixels in filled.items():
            assert (pixels == (row.mask == class_id)).all()  # holes, parts and single pixels, each pixel once
        seen.append(stem)
    assert sorted(seen) == sorted(rows) and len(seen) == 59


def test_every_mask_by_ultralytics_rules(tmp_path):
    source = dataset(tmp_path / "a", 60)
    out, rows = converted(source, tmp_path / "b", "yolo", val=0.2), rows_by_name(source)
    described = yaml.safe_load((out / "semantic.yaml").read_text())
    assert described["names"] == {0: "background", 1: "dog", 2: "traffic light"}
    seen = []
    for stem, split, _ in places(out, "semantic.yaml"):
        mask = Image.open(out / described["masks_dir"] / split / f"{stem}.png")
        assert mask.mode == "L" and (np.array(mask) == NUMBER[rows[stem].mask]).all()
        seen.append(stem)
    assert sorted(seen) == sorted(rows)


def test_no_folder_is_taken_for_another_task(tmp_path):
    """Ultralytics takes a folder named `masks` for the semantic task, whatever the description says."""
    out = converted(dataset(tmp_path / "a"), tmp_path / "b", "yolo")
    kinds = ["convert.json", "data.yaml", "images", "labels", "semantic", "semantic.yaml"]
    assert sorted(path.name for path in out.iterdir()) == kinds
    described = yaml.safe_load((out / "data.yaml").read_text())
    assert described["train"] == described["val"] == "images/train"


@pytest.fixture
def offline(tmp_path, monkeypatch):
    for name, value in (("YOLO_CONFIG_DIR", str(tmp_path)), ("YOLO_OFFLINE", "1"), ("YOLO_AUTOINSTALL", "false")):
        monkeypatch.setenv(name, value)
    pytest.importorskip("ultralytics")


@pytest.mark.slow
def test_a_training_step_of_both_tasks_by_ultralytics(tmp_path, offline):
    from ultralytics.cfg import get_cfg
    from ultralytics.data.build import build_yolo_dataset
    from ultralytics.data.utils import check_det_dataset
    from ultralytics.nn.tasks import SegmentationModel, SemanticSegmentationModel

    out = converted(dataset(tmp_path / "a"), tmp_path / "b", "yolo", val=0.3)
    for task, name, kind, file in (
        ("segment", "data.yaml", SegmentationModel, "yolo26n-seg.yaml"),
        ("semantic", "semantic.yaml", SemanticSegmentationModel, "yolo26n-sem.yaml"),
    ):
        data, config = check_det_dataset(str(out / name), autodownload=False), get_cfg(overrides={"task": task})
        config.imgsz = 64
        examples = build_yolo_dataset(config, data["train"], 2, data, mode="train")
        batch = examples.collate_fn([examples[index] for index in range(3)])
        batch["img"] = batch["img"].float() / 255
        model = kind(file, ch=3, nc=len(data["names"]), verbose=False)
        model.args, model.names = config, data["names"]
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer = torch.optim.SGD(model.train().parameters(), 1e-3)
        loss, _ = model.loss(batch)
        loss.sum().backward()
        optimizer.step()
        assert loss.isfinite().all() and loss.sum() > 0
        assert sum((new != old).any().item() for new, old in zip(model.parameters(), before, strict=True)) > 50


@pytest.mark.slow
def test_every_polygon_and_mask_by_ultralytics(tmp_path, offline):
    from ultralytics.cfg import get_cfg
    from ultralytics.data.build import build_yolo_dataset
    from ultralytics.data.utils import check_det_dataset, polygons2masks, read_mask

    source = dataset(tmp_path / "a", 60)
    out, rows = converted(source, tmp_path / "b", "yolo", val=0.2), rows_by_name(source)
    for task, name in (("segment", "data.yaml"), ("semantic", "semantic.yaml")):
        data = check_det_dataset(str(out / name), autodownload=False)
        for split in ("train", "val"):
            examples = build_yolo_dataset(
                get_cfg(overrides={"task": task, "imgsz": 64}), data[split], 2, data, mode="val"
            )
            assert len(examples) == len(list((out / "images" / split).iterdir())) > 0
            for index, label in enumerate(examples.labels):
                stem = label["im_file"].rpartition("/")[2].removesuffix(".png")
                truth = rows[stem].mask
                if task == "semantic":
                    assert (read_mask(examples.mask_files[index], "L") == NUMBER[truth]).all()
                    continue
                size = np.array(truth.shape[::-1])
                for number, class_id in LABELS.items():
                    own = [s for s, cls in zip(label["segments"], label["cls"], strict=True) if cls[0] == number]
                    masks = polygons2masks(truth.shape, [(part * size).reshape(-1) for part in own], 1)
                    assert (np.sum(masks, 0) == (truth == class_id)).all()
