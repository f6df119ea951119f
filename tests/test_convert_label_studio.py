"""convert/label_studio.py, read by label-studio-sdk's converter where it is installed, and by its rules written out."""

import json
from urllib.parse import parse_qs, urlsplit
from xml.etree import ElementTree

import numpy as np
import pytest
from foreign import converted, dataset, rows_by_name
from PIL import Image
from test_convert_brush import read

LABELS = {"dog": 12, "traffic light": 21, "ignored": 255}


def tasks_of(out):
    """Yield all tasks with their split."""
    for split in ("train", "val"):
        paths = sorted((out / "tasks").glob(f"{split}-*.json"))
        assert [path.name for path in paths] == [f"{split}-{number:06d}.json" for number in range(len(paths))]
        for path in paths:
            for task in json.loads(path.read_text()):
                yield split, task


def local_file(out, task):
    """Return the file that a task's address stands for, as Label Studio finds it below its document root."""
    address = urlsplit(task["data"]["image"])
    assert address.path == "/data/local-files/"
    (place,) = parse_qs(address.query)["d"]
    return out / place


def test_every_mask_by_label_studios_rules(tmp_path):
    source = dataset(tmp_path / "a", 60)
    out, rows, seen = converted(source, tmp_path / "b", "label-studio", val=0.2), rows_by_name(source), []
    for split, task in tasks_of(out):
        row = rows[task["data"]["key"]]
        image = local_file(out, task)
        assert image.parts[-2] == split and (np.array(Image.open(image)) == row.image).all()
        (prediction,) = task["predictions"]
        assert prediction["score"] == 0.25 and len({found["id"] for found in prediction["result"]}) == 3
        mask = np.zeros_like(row.mask)
        for found in prediction["result"]:
            size = found["original_height"], found["original_width"]
            assert (found["type"], found["value"]["format"], size) == ("brushlabels", "rle", mask.shape)
            (label,) = found["value"]["brushlabels"]
            assert found.get("score") == {"dog": 0.5, "traffic light": 0.25, "ignored": None}[label]
            mask[read(found["value"]["rle"]).reshape(*size, 4)[..., 3] > 0] = LABELS[label]
        assert (mask == row.mask).all()
        seen.append(row.key)
    assert sorted(seen) == sorted(rows) and len(seen) == 59


def test_the_interface_names_what_the_tasks_name(tmp_path):
    out = converted(dataset(tmp_path / "a"), tmp_path / "b", "label-studio")
    view = ElementTree.parse(out / "interface.xml").getroot()
    image, brush = view.find("Image"), view.find("BrushLabels")
    assert [label.get("value") for label in brush] == list(LABELS)
    assert image.get("value") == "$image" and brush.get("toName") == image.get("name")
    _, task = next(tasks_of(out))
    found = task["predictions"][0]["result"][0]
    assert (found["from_name"], found["to_name"]) == (brush.get("name"), image.get("name"))
    assert list(task["data"])[0] == "image" and task["data"]["prompt"].startswith("a photo of dog and traffic light")


@pytest.mark.slow
def test_every_mask_by_label_studios_converter(tmp_path):
    """A person accepts each pre-annotation as it is, and exports them all as PNG files."""
    pytest.importorskip("label_studio_sdk.converter.converter")
    from label_studio_sdk.converter import Converter

    source = dataset(tmp_path / "a", 60)
    out, rows = converted(source, tmp_path / "b", "label-studio", val=0.2), rows_by_name(source)
    accepted, keys = [], {}
    for number, (_, task) in enumerate(tasks_of(out), 1):
        keys[number] = task["data"]["key"]
        annotation = {"id": number, "result": task["predictions"][0]["result"], "completed_by": {"email": "a@b.c"}}
        accepted.append({"id": number, "data": task["data"], "annotations": [annotation]})
    (tmp_path / "export.json").write_text(json.dumps(accepted))
    (tmp_path / "png").mkdir()
    converter = Converter((out / "interface.xml").read_text(), str(tmp_path))
    converter.convert(str(tmp_path / "export.json"), str(tmp_path / "png"), "BRUSH_TO_PNG", is_dir=False)
    assert len(list((tmp_path / "png").iterdir())) == 3 * 59
    for number, key in keys.items():
        mask = np.zeros_like(rows[key].mask)
        for label, class_id in LABELS.items():
            (path,) = (tmp_path / "png").glob(f"task-{number}-annotation-{number}-*-tag-{label}-0.png")
            mask[np.array(Image.open(path)) > 0] = class_id
        assert (mask == rows[key].mask).all()
